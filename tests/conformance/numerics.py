"""bfloat16, twins, checkpoints."""

import dataclasses
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.conformance.setting import (
    easy,
    inputs_of,
    model_of,
    odd,
    plan_of,
    report_of,
    run_of,
)
from tests.methods_table import Row
from tokred.nn.skeleton import split_model
from tokred.train.checkpoint import Checkpoints
from tokred.train.state import init_state


def check_bf16_agrees(row: Row) -> None:
    """Near ties may choose another token: the bound is on the mean over the batch."""
    exact, _ = report_of(row, easy(row))
    half = dataclasses.replace(odd(row), dtype=jnp.bfloat16)
    logits, report = run_of(row, half, easy(row))(inputs_of(odd(row)))
    assert report.tokens.x.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits - exact)).mean() / np.asarray(exact).std()
    assert error < row.bf16, f"{error:.3f} standard deviations"


def check_soft_is_packed(row: Row) -> None:
    """In evaluation, with the options that are declared exact; of text, what did not leave."""
    assert row.exact is not None
    plan = plan_of(row, odd(row), row.exact)
    packed, left = report_of(row, plan)
    soft, report = report_of(row, plan.with_twin("soft"))
    assert report.tokens.n == odd(row).layout.tokens
    if packed.ndim == 3:
        here = np.asarray(left.tokens.sources()) >= 0
        packed, soft = left.restore(packed)[here], report.restore(soft)[here]
    np.testing.assert_allclose(soft, packed, rtol=1e-4, atol=1e-5)


def check_saved_is_restored(row: Row) -> None:
    graph, state = model_of(odd(row), easy(row))
    skeleton, weights = split_model(nnx.merge(graph, state))
    expected, _ = report_of(row, easy(row))
    with tempfile.TemporaryDirectory() as workdir:
        with Checkpoints(workdir) as checkpoints:
            state = init_state(weights, optax.sgd(0.1), ())
            checkpoints.save(1, state, data={}, about={"config": {}})
        with Checkpoints(workdir, create=False) as checkpoints:
            blank = jax.tree.map(jnp.zeros_like, weights)
            model = skeleton.merge(*checkpoints.model(blank))
    run = run_of(row, odd(row), easy(row))
    restored, _ = jax.jit(run.forward)(nnx.state(model), inputs_of(odd(row)), None)
    np.testing.assert_array_equal(restored, expected)
