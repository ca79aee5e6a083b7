"""Token by token with a cache, as one full pass under the causal twin."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tests.conformance.models import BATCH, extra_at, places, prompts
from tests.conformance.setting import decoding, inputs_of, model_of, odd, run_of
from tests.methods_table import Extra, Row
from tokred.models import DecoderConfig
from tokred.plan import Plan
from tokred.report import Call

SLOTS = 7  # of a prefill
STEPS = 4
SKIPPING = ("around", "around_attention")


class Decoded(NamedTuple):
    """Logits at the prompts' slots and at each step, caches after the prefill and at the end."""

    prompt: Array
    steps: list[Array]
    prefilled: Any
    cache: Any


class Decoder:
    """Compiled calls of a model with a cache."""

    def __init__(self, config: DecoderConfig, plan: Plan, extra: Extra | None):
        self.graph, self.state = model_of(config, plan)
        self.plan, self.extra = plan.with_twin("causal"), extra
        self.empty = nnx.merge(self.graph, self.state).make_cache(BATCH, SLOTS + STEPS, plan=plan)
        self._jitted = jax.jit(self._extend, static_argnames=("fresh", "skip"))

    def _extend(self, state: Any, ids: Array, cache: Any, valid: Any, fresh: bool, skip: bool):
        model = nnx.merge(self.graph, state)
        extra = extra_at(self.extra, places(ids, valid, cache.seen))
        how = {"plan": self.plan, "valid": valid, "extra": extra, "fresh": fresh}
        logits, cache, _ = model.extend(ids, cache, call=Call(skip=skip), **how)
        return logits, cache

    def prefill(self, ids: Array, lengths: Array, cache: Any, *, fresh: bool) -> tuple[Array, Any]:
        """The first `lengths` of some ids [B SLOTS]."""
        valid = jnp.arange(SLOTS)[None] < lengths[:, None]
        return self._jitted(self.state, ids, cache, valid, fresh=fresh, skip=False)

    def step(self, ids: Array, cache: Any) -> tuple[Array, Any]:
        return self._jitted(self.state, ids, cache, None, fresh=False, skip=True)


@functools.cache
def _decoder(config: DecoderConfig, plan: Plan, extra: Extra | None) -> Decoder:
    return Decoder(config, plan, extra)


@functools.cache
def _decoded(config: DecoderConfig, plan: Plan, extra: Extra | None) -> Decoded:
    decoder, ids = _decoder(config, plan, extra), inputs_of(config)
    prompt, cache = decoder.prefill(ids[:, :SLOTS], prompts(), decoder.empty, fresh=True)
    prefilled, steps = cache, []
    for t in range(STEPS):
        logits, cache = decoder.step(at(ids, prompts() + t), cache)
        steps.append(logits)
    return Decoded(prompt, steps, prefilled, cache)


def decoded(row: Row) -> Decoded:
    return _decoded(odd(row), decoding(row), row.extra)


def full(row: Row) -> Any:
    return run_of(row, odd(row), decoding(row).with_twin("causal"))(inputs_of(odd(row)))


def at(a: Array, place: Array) -> Array:
    """[B N ...] at one place of each example: [B 1 ...]."""
    return jnp.take_along_axis(a, place.reshape(-1, *[1] * (a.ndim - 1)), axis=1)


def equal_at_prompts(found: Any, wanted: Any) -> None:
    inside = np.arange(SLOTS)[None] < np.asarray(prompts())[:, None]
    found, wanted = np.asarray(found)[inside], np.asarray(wanted[:, :SLOTS])[inside]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


def check_cached_decoding_is_the_full_pass(row: Row) -> None:
    """Prompts of different lengths, then token for token."""
    logits, _ = full(row)
    mine = decoded(row)
    equal_at_prompts(mine.prompt, logits)
    for t, found in enumerate(mine.steps):
        np.testing.assert_allclose(found, at(logits, prompts() + t), rtol=1e-4, atol=2e-5)


def check_prefill_may_come_in_pieces(row: Row) -> None:
    """A first piece, then the rest, which may be empty: the same logits and the same cache."""
    decoder = _decoder(odd(row), decoding(row), row.extra)
    ids, first = inputs_of(odd(row)), 2 + prompts() // 2
    head, cache = decoder.prefill(ids[:, :SLOTS], first, decoder.empty, fresh=False)
    shifted = jnp.take_along_axis(ids, first[:, None] + jnp.arange(SLOTS)[None], axis=1)
    tail, cache = decoder.prefill(shifted, prompts() - first, cache, fresh=False)
    slot = jnp.arange(SLOTS)[None]
    late = jnp.take_along_axis(tail, jnp.maximum(slot - first[:, None], 0)[..., None], axis=1)
    joined = jnp.where((slot < first[:, None])[..., None], head, late)
    equal_at_prompts(joined, full(row)[0])
    for found, wanted in zip(
        jax.tree.leaves(cache), jax.tree.leaves(decoded(row).prefilled), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


def check_skipped_tokens_have_no_entry(row: Row) -> None:
    cache, report = decoded(row).cache, full(row)[1]
    seen = np.arange(odd(row).context)[None] < np.asarray(cache.seen)[:, None]
    np.testing.assert_array_equal(cache.seen, prompts() + STEPS)
    held = cache.occupancy()
    for layer, slots in enumerate(cache.layers):
        entered = seen & (np.asarray(report.sources[layer]) >= 0)
        for kind in SKIPPING:
            if map_ := report.maps.get(f"{kind}_{layer}"):
                entered &= np.asarray(map_.source) >= 0
        np.testing.assert_array_equal(held[:, layer], entered.sum(-1))
        np.testing.assert_array_equal(slots.dropped, 0)
    if any(site.kind in SKIPPING for site, _ in decoding(row).steps):
        assert (np.asarray(held) < np.asarray(cache.seen)[:, None]).any()
