"""Eight devices: the same numbers, and no talk between them but the sum of gradients."""

import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.conformance.gradients import by_path, gradients
from tests.conformance.models import kind_of
from tests.conformance.setting import (
    KEY,
    easy,
    inputs_of,
    loss_of,
    model_of,
    odd,
    report_of,
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
    assert jax.device_count() > 1, "needs several devices, such as virtual ones of a CPU"
    mesh = Mesh(np.array(jax.devices()), ("data",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def check_forward_needs_no_collective(row: Row) -> None:
    """Nor does it change a number."""
    everywhere, split = shardings()
    run = run_of(row, odd(row), easy(row))

    def logits(state, inputs):
        out, report = run.forward(state, inputs, None)
        return out, {site: map_.source for site, map_ in report.maps.items()}

    args = jax.device_put(run.state, everywhere), jax.device_put(inputs_of(odd(row)), split)
    traces = run.traces
    compiled = jax.jit(logits, out_shardings=(split, split)).lower(*args).compile()
    run.traces = traces
    assert COLLECTIVES.findall(compiled.as_text() or "") == []
    out, sources = compiled(*args)
    expected, report = report_of(row, easy(row))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    for site, map_ in report.maps.items():
        np.testing.assert_array_equal(sources[site], map_.source)


def check_training_only_sums_gradients(row: Row) -> None:
    everywhere, split = shardings()
    config, plan = odd(row), training(row)
    graph, state = model_of(config, plan)
    loss = jax.grad(loss_of(graph, row, plan), (0, 3))
    step = jax.jit(loss, out_shardings=(everywhere, split))
    args = (
        jax.device_put(state, everywhere),
        jax.device_put(inputs_of(config), split),
        jax.device_put(KEY, everywhere),
        jax.device_put(kind_of(config).nudge(config), split),
    )
    compiled = step.lower(*args).compile()
    assert set(COLLECTIVES.findall(compiled.as_text() or "")) == {"all-reduce"}
    expected, params = gradients(row, plan)[0], compiled(*args)[0]
    for name, value in by_path(params).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)
