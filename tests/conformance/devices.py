"""Eight devices: the same numbers, and no talk between them but the sum of gradients."""

import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.conformance.gradients import by_path, gradients
from tests.conformance.setting import (
    KEY,
    ODD,
    easy,
    easy_report,
    images_of,
    loss_of,
    model_of,
    run_of,
    training,
)
from tests.methods_table import Row

COLLECTIVES = re.compile(
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast)"
    r"(?:-start)?\("
)


def shardings() -> tuple[NamedSharding, NamedSharding]:
    """(replicated, split by example)."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def check_forward_needs_no_collective(row: Row) -> None:
    """Nor does it change a number."""
    everywhere, split = shardings()
    run = run_of(ODD, easy(row))

    def logits(state, images):
        out, report = run.forward(state, images, None)
        return out, report.tokens.sources()

    args = jax.device_put(run.state, everywhere), jax.device_put(images_of(ODD), split)
    traces = run.traces
    compiled = jax.jit(logits, out_shardings=(split, split)).lower(*args).compile()
    run.traces = traces
    assert COLLECTIVES.findall(compiled.as_text() or "") == []
    out, sources = compiled(*args)
    expected, report = easy_report(easy(row))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(sources, report.tokens.sources())


def check_training_only_sums_gradients(row: Row) -> None:
    everywhere, split = shardings()
    graph, state = model_of(ODD, training(row))
    step = jax.jit(jax.grad(loss_of(graph, training(row))), out_shardings=everywhere)
    args = (
        jax.device_put(state, everywhere),
        jax.device_put(images_of(ODD), split),
        jax.device_put(KEY, everywhere),
    )
    compiled = step.lower(*args).compile()
    assert set(COLLECTIVES.findall(compiled.as_text() or "")) == {"all-reduce"}
    expected = gradients(training(row))[0]
    for name, value in by_path(compiled(*args)).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)
