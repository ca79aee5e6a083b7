"""Adapters of the family `kv` that follow a cache over prompt and steps: H2O, StreamingLLM."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tests.golden_adapters.case import Adapter, Case
from tokred.cache import LayerCache, Look, hold
from tokred.methods.h2o import H2O
from tokred.methods.streaming_llm import StreamingLLM
from tokred.ops import cached_attention, cached_probs
from tokred.rotary import rotate_by

Weigh = Callable[[Array, Array, LayerCache], Array]


def in_order(cache: LayerCache, x: Array) -> tuple[Array, Array]:
    """(positions, x [H C]) of the only example by ascending position, -1 where a slot is empty."""
    place, live = cache.position[0], cache.valid[0]
    order = jnp.argsort(jnp.where(live, place, jnp.inf), axis=-1)
    take = lambda a: jnp.take_along_axis(a, order, axis=-1)  # noqa: E731
    return take(place), jnp.where(take(live), take(x), -1.0)


def stored(probs: Array) -> Weigh:
    """Attention that is given [H Q T], its keys by ascending position."""

    def weigh(q: Array, position: Array, cache: LayerCache) -> Array:
        rank = jnp.argsort(jnp.argsort(jnp.where(cache.valid, cache.position, jnp.inf), -1), -1)
        there = probs[None, :, :, : cache.capacity]
        found = jnp.take_along_axis(there, rank[:, :, None, :], axis=-1)
        return jnp.where(cache.valid[:, :, None, :], found, 0.0)

    return weigh


def h2o_drop(case: Case) -> dict[str, Any]:
    s, first, steps = case.settings, case.inputs["prefill_attn"][0], case.inputs["step_attn"]
    heads, prompt, _ = first.shape
    budget = s["hh_size"] + s["recent_size"]
    evict = H2O(budget, recent=s["recent_size"])
    none = lambda n: jnp.zeros((1, n, heads, 1))  # noqa: E731
    place = jnp.arange(prompt, dtype=jnp.float32)[None]
    cache = hold(none(prompt), none(prompt), place)
    cache = evict.begin(cache, Look(none(prompt), place, stored(first)))
    cache = cache.resize(evict.room(prompt, prompt + len(steps), 0, 1))
    told = [in_order(cache, cache.score[0])]
    for step, probs in enumerate(steps):
        place = jnp.full((1, 1), float(prompt + step))
        cache = cache.append(none(1), none(1), place)
        cache = evict.go_on(cache, Look(none(1), place, stored(probs[:, None])))
        told.append(in_order(cache, cache.score[0]))
    positions, scores = (jnp.stack(x)[..., :budget] for x in zip(*told, strict=True))
    return {"keep_positions": positions, "scores": scores}


def split(x: Array, weight: Array, width: int) -> Array:
    """[1 N H E] of [1 N D]."""
    y = jnp.einsum("bnd,ed->bne", x, weight)
    return y.reshape(*y.shape[:2], -1, width)


def h2o_mask(case: Case) -> dict[str, Any]:
    """Officially what leaves the window of recent entries is not seen for one step; then it may
    stay as any other."""
    s, p = case.settings, case.params
    heavy, recent = s["heavy_budget"], s["recent_budget"]
    evict = H2O(heavy + recent, recent=recent)
    prompt, steps = case.inputs["prefill_hidden"], jnp.asarray(case.inputs["decode_hidden"])
    n, total = prompt.shape[1], prompt.shape[1] + len(steps)
    project = lambda x: [split(x, p[f"{a}_proj"], s["head_dim"]) for a in "qkv"]  # noqa: E731

    def seen(position: Array, cache: LayerCache) -> Array:
        now, alone = position[:, None, :, None], position.shape[-1] == 1
        left = (cache.position[:, :, None] == now - recent) & (now > heavy + recent)
        return cache.mask(position[..., None]) & ~(left & alone)

    def weigh(q: Array, position: Array, cache: LayerCache) -> Array:
        return cached_probs(q, cache.k, mask=seen(position, cache))

    def attend(q: Array, position: Array, cache: LayerCache) -> Array:
        y = cached_attention(q, cache.k, cache.v, mask=seen(position, cache))
        return y.reshape(*y.shape[:2], -1) @ p["o_proj"].T

    def spread(x: Array, cache: LayerCache, width: int) -> Array:
        """x [1 H C] at the positions of its entries."""
        at = jnp.where(cache.valid, cache.position, width)[0].astype(jnp.int32)
        rows = jnp.arange(at.shape[0])[:, None]
        return jnp.zeros((at.shape[0], width)).at[rows, at].set(x[0], mode="drop")

    def state(cache: LayerCache, count: Any) -> tuple[Array, Array]:
        """Who may be looked at next, and the scores of what is held."""
        place, held = jnp.arange(total + 1), spread(cache.valid * 1.0, cache, total + 1) > 0
        held &= ((place != count - recent) | (count <= heavy + recent))[None]
        return held | (place == count)[None], spread(cache.score, cache, total)

    def step(cache: LayerCache, at: tuple[Array, Array]) -> tuple[LayerCache, Any]:
        count, x = at
        q, k, v = project(x[None])
        place = jnp.full((1, 1), count, jnp.float32)
        cache = cache.append(k, v, place)
        y = attend(q, place, cache)[0, 0]
        cache = evict.go_on(cache, Look(q, place, weigh))
        return cache, (y, *state(cache, count + 1))

    q, k, v = project(prompt)
    place = jnp.arange(n, dtype=jnp.float32)[None]
    whole = hold(k, v, place)
    cache = evict.begin(whole, Look(q, place, weigh)).resize(evict.room(n, total, 0, 1))
    _, (y, *later) = jax.lax.scan(step, cache, (jnp.arange(n, total), steps))
    told = [jnp.concatenate([a[None], b]) for a, b in zip(state(cache, n), later, strict=True)]
    return {
        "prefill": attend(q, place, whole), "decode": y[None], "next_mask": told[0],
        "acc_scores": told[1],
    }  # fmt: skip


def streaming(case: Case) -> dict[str, Any]:
    """Original positions travel in the field of scores, since those of the cache are renumbered."""
    s, p = case.settings, case.params
    prompt, steps = case.inputs["prefill_hidden"], case.inputs["decode_hidden"]
    n, width = prompt.shape[1], prompt.shape[2] // s["num_heads"]
    evict = StreamingLLM(s["start_size"] + s["recent_size"] - 1, 1, s["start_size"])
    cos, sin = (case.inputs[name][1, : width // 2] for name in ("cos", "sin"))
    rates = jnp.arctan2(sin, cos)  # what one position turns
    project = lambda x: [split(x, p[f"{a}_proj"], width) for a in "qkv"]  # noqa: E731

    def attend(q: Array, position: Array, cache: LayerCache) -> Array:
        q = rotate_by(q, position[..., None], rates)
        k = rotate_by(cache.k, cache.position, rates)
        y = cached_attention(q, k, cache.v, mask=cache.mask(position[..., None]))
        return y.reshape(*y.shape[:2], -1) @ p["o_proj"].T

    q, k, v = project(prompt)
    place = jnp.arange(n, dtype=jnp.float32)[None]
    cache = hold(k, v, place, raw=True)
    cache = replace(cache, score=cache.position)
    first = attend(q, place, cache)
    look = lambda q, place: Look(q, place, lambda *_: jnp.zeros(()))  # noqa: E731
    cache = evict.begin(cache, look(q, place)).resize(evict.room(n, n + len(steps), 0, 1))
    outs, kept, asked = [], [], []
    for step, x in enumerate(steps):
        q, k, v = project(x[None])
        place = cache.length[:, :1].astype(jnp.float32)
        cache = cache.append(k, v, place)
        new = cache.position == place[..., None]
        cache = replace(cache, score=jnp.where(new, n + step, cache.score))
        outs.append(attend(q, place, cache)[:, 0])
        kept.append(in_order(cache, cache.score[0])[1][0])
        asked.append(place[0, 0])
        cache = evict.go_on(cache, look(q, place))
    width = case.outputs["keep_positions"].shape[1]
    kept = jnp.pad(
        jnp.stack(kept), ((0, 0), (0, max(0, width - kept[0].shape[0]))), constant_values=-1
    )
    return {
        "prefill": first, "decode": jnp.stack(outs, 1), "keep_positions": kept[:, :width],
        "query_position": jnp.stack(asked),
    }  # fmt: skip


KV_TRACES: dict[str, Adapter] = {
    "h2o_drop_trace": Adapter(h2o_drop),
    "h2o_mask_trace": Adapter(h2o_mask),
    "streamingllm": Adapter(streaming),
}
