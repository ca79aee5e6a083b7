"""What holds of sequences alone: padding on either side, and what a token may know."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tests.conformance.models import BATCH, MODELS, Result, kind_of
from tests.conformance.setting import KEY, decoding, even, inputs_of, odd, plan_of, run_of
from tests.methods_table import Row
from tokred import cost
from tokred.report import Call

PADDED = 4


def of_originals(result: Result) -> Array:
    """Logits in the places of the tokens that they are of, 0 where tokens left."""
    logits, report = result
    return report.restore(logits)


def check_padding_changes_nothing(row: Row) -> None:
    """On the right, on the left, and whatever its ids are."""
    config = even(row)
    run = run_of(row, config, plan_of(row, config, row.hard))
    n = config.context - PADDED
    ids = inputs_of(config)[:, :n]
    expected = of_originals(run(ids))
    for padding, other in (((0, PADDED), 3), ((PADDED, 0), 5)):
        wide = jnp.pad(ids, ((0, 0), padding), constant_values=other)
        valid = jnp.pad(jnp.ones(ids.shape, bool), ((0, 0), padding))
        found = of_originals(run(wide, valid))[:, padding[0] : padding[0] + n]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


def check_decisions_know_no_future(row: Row) -> None:
    """Under the causal twin, bit for bit."""
    config = odd(row)
    run = run_of(row, config, decoding(row).with_twin("causal"))
    ids = inputs_of(config)
    logits, _ = run(ids)
    for t in (3, 9):
        later = jnp.arange(config.context)[None] > t
        changed, _ = run(jnp.where(later, (ids + 1) % config.vocab, ids))
        np.testing.assert_array_equal(changed[:, : t + 1], logits[:, : t + 1])
        assert (changed[:, t + 1 :] != logits[:, t + 1 :]).any(-1).all()


def check_macs_are_the_compilers(row: Row) -> None:
    """Within 5 %, at a width where elementwise work is small."""
    wide = {"width": 256, "hidden": 768, "context": 128, "vocab": 128}
    config = dataclasses.replace(MODELS[row.model].odd, head_dim=64, **wide)
    plan = plan_of(row, config, row.easy)
    model = nnx.eval_shape(lambda: kind_of(config).make(config, plan, nnx.Rngs(0)))
    graph, state = nnx.split(model)
    ids = jax.ShapeDtypeStruct((BATCH, config.context), jnp.int32)

    def forward(state: Any, ids: Any) -> Any:
        call = Call(key=KEY)
        model = nnx.merge(graph, state)
        return kind_of(config).run(model, ids, None, plan, call, row.extra, None)[0]

    counted = cost.compiled_macs(forward, state, ids) / BATCH
    np.testing.assert_allclose(cost.macs(config, plan), counted, rtol=0.05)
