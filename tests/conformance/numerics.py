"""bfloat16, twins, checkpoints."""

import dataclasses
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.conformance.setting import (
    ODD,
    easy,
    easy_report,
    images_of,
    model_of,
    plan_of,
    run_of,
)
from tests.methods_table import Row
from tokred.train.checkpoint import Checkpoints
from tokred.train.state import init_state, split_model


def check_bf16_agrees(row: Row) -> None:
    """Near ties may choose another token: the bound is on the mean over the batch."""
    exact, _ = easy_report(easy(row))
    half = dataclasses.replace(ODD, dtype=jnp.bfloat16)
    logits, report = run_of(half, easy(row))(images_of(ODD))
    assert report.tokens.x.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits - exact)).mean() / np.asarray(exact).std()
    assert error < row.bf16, f"{error:.3f} standard deviations"


def check_soft_is_packed(row: Row) -> None:
    """In evaluation, with the options that are declared exact."""
    assert row.exact is not None
    plan = plan_of(row, ODD, row.exact)
    packed, _ = easy_report(plan)
    soft, report = easy_report(plan.with_twin("soft"))
    assert report.tokens.n == ODD.layout.tokens
    np.testing.assert_allclose(soft, packed, rtol=1e-4, atol=1e-5)


def check_saved_is_restored(row: Row) -> None:
    graph, state = model_of(ODD, easy(row))
    skeleton, weights = split_model(nnx.merge(graph, state))
    expected, _ = easy_report(easy(row))
    with tempfile.TemporaryDirectory() as workdir:
        with Checkpoints(workdir) as checkpoints:
            state = init_state(weights, optax.sgd(0.1), ())
            checkpoints.save(1, state, data={}, about={"config": {}})
        with Checkpoints(workdir, create=False) as checkpoints:
            blank = jax.tree.map(jnp.zeros_like, weights)
            model = skeleton.merge(*checkpoints.model(blank))
    run = run_of(ODD, easy(row))
    restored, _ = jax.jit(run.forward)(nnx.state(model), images_of(ODD), None)
    np.testing.assert_array_equal(restored, expected)
