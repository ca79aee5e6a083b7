"""Properties of what makes a cache smaller, in a decoder that goes on from prompts of 4 to 7."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tests.conformance.devices import COLLECTIVES, shardings
from tests.conformance.models import BATCH, prompts
from tests.conformance.setting import DENSE, inputs_of, odd, plan_of, split_model
from tests.methods_table import Options, Row
from tokred.cache import Eviction, cache_reduction
from tokred.models import DecoderConfig
from tokred.models.generate import Generated, generate
from tokred.plan import Plan

SLOTS, STEPS = 7, 4
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)


class Run:
    """Compiled generation; `traces` counts compilations."""

    def __init__(self, config: DecoderConfig, plan: Plan):
        self.graph, self.state = split_model(config, DENSE)
        self.plan, self.traces = plan, 0
        self.jitted = jax.jit(self.go_on)

    def go_on(self, state: Any, ids: Array, valid: Array) -> Generated:
        self.traces += 1
        model = nnx.merge(self.graph, state)
        return generate(model, ids, steps=STEPS, plan=self.plan, valid=valid)

    def __call__(self, ids: Array, valid: Array) -> Generated:
        return self.jitted(self.state, ids, valid)


@functools.cache
def _run(config: DecoderConfig, plan: Plan) -> Run:
    return Run(config, plan)


def run(row: Row, options: Options) -> Run:
    return _run(odd(row), plan_of(row, odd(row), options))


def behind(config: DecoderConfig, seed: int = 0) -> tuple[Array, Array]:
    """Prompts with their padding behind."""
    return inputs_of(config, seed)[:, :SLOTS], jnp.arange(SLOTS)[None] < prompts()[:, None]


@functools.cache
def _generated(config: DecoderConfig, plan: Plan) -> Generated:
    return _run(config, plan)(*behind(config))


def generated(row: Row) -> Generated:
    return _generated(odd(row), plan_of(row, odd(row), row.easy))


def check_with_room_for_all_nothing_changes(row: Row) -> None:
    got = _generated(odd(row), plan_of(row, odd(row), row.nothing))
    close(got.logits, _generated(odd(row), DENSE).logits)


def check_holds_no_more_than_its_budget(row: Row) -> None:
    """On average over layers; and nothing that comes is lost for want of a slot."""
    cache, plan = generated(row).cache, plan_of(row, odd(row), row.easy)
    config, evict = odd(row), cache_reduction(plan)
    assert isinstance(evict, Eviction)
    rooms = [evict.room(SLOTS, SLOTS + STEPS, i, config.depth) for i in range(config.depth)]
    assert [layer.capacity for layer in cache.layers] == rooms
    entry = 2 * BATCH * config.groups * config.shape(0).head_dim * 4
    assert cache.nbytes() == sum(rooms) * entry
    held = np.stack([layer.length for layer in cache.layers])
    more = STEPS if evict.spare is None else 0
    assert abs(held.mean() - row.left - more) <= 0.5
    assert all(not layer.dropped.any() for layer in cache.layers)


def check_holds_entries_of_the_text(row: Row) -> None:
    """The first layer's, under their own positions."""
    mine, full = generated(row).cache.layers[0], _generated(odd(row), DENSE).cache.layers[0]
    same = mine.position[..., :, None] == full.position[..., None, :]
    np.testing.assert_array_equal((same & mine.valid[..., None]).sum(-1), mine.valid)
    for name in ("k", "v"):
        there = getattr(full, name)
        rows = jnp.einsum("bgct,bgte->bgce", same.astype(jnp.float32), there)
        wanted = jnp.where(mine.valid[..., None], rows, 0.0)
        got = jnp.where(mine.valid[..., None], getattr(mine, name), 0.0)
        prompt = mine.position < prompts()[:, None, None]  # later ones may be of other tokens
        close(jnp.where(prompt[..., None], got, 0.0), jnp.where(prompt[..., None], wanted, 0.0))


def check_padding_may_stand_on_either_side(row: Row) -> None:
    ids = inputs_of(odd(row))[:, :SLOTS]
    shift = (SLOTS - prompts())[:, None]
    place = (jnp.arange(SLOTS)[None] - shift) % SLOTS
    in_front = jnp.take_along_axis(ids, place, axis=1)
    got = run(row, row.easy)(in_front, jnp.arange(SLOTS)[None] >= shift)
    close(got.logits, generated(row).logits)


def check_permuted_batch_permutes_the_text(row: Row) -> None:
    order = jnp.array([3, 1, 7, 0, 6, 2, 5, 4])
    ids, valid = behind(odd(row))
    compiled = run(row, row.easy)
    got = compiled(ids[order], valid[order])
    close(got.logits, generated(row).logits[order])
    traces = compiled.traces
    compiled(behind(odd(row), 1)[0], valid)
    assert compiled.traces == traces


def check_takes_blocks(row: Row) -> None:
    """Two at a time: never fewer than the budget, never more than one slot is free."""
    got = _generated(odd(row), plan_of(row, odd(row), {**row.easy, "spare": 2}))
    for layer in got.cache.layers:
        held = np.asarray(layer.length)
        assert (
            layer.capacity == row.left + 2 and ((held >= row.left) & (held <= row.left + 1)).all()
        )


def check_needs_no_collective(row: Row) -> None:
    everywhere, split = shardings()
    made = run(row, row.easy)
    args = jax.device_put(made.state, everywhere), *jax.device_put(behind(odd(row)), split)
    traces = made.traces
    compiled = jax.jit(made.go_on, out_shardings=split).lower(*args).compile()
    made.traces = traces
    assert COLLECTIVES.findall(compiled.as_text() or "") == []
    close(compiled(*args).logits, generated(row).logits)


def check_bfloat16_stays_close(row: Row) -> None:
    """The first logits, of which no choice between equals is part."""
    config = dataclasses.replace(odd(row), dtype=jnp.bfloat16)
    got = _generated(config, plan_of(row, config, row.easy))
    wanted = generated(row).logits
    assert got.cache.layers[0].k.dtype == jnp.bfloat16
    gap = jnp.abs(got.logits[:, 0] - wanted[:, 0]).max() / wanted.std()
    assert gap < row.bf16
