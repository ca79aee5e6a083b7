"""ZipCache while decoding: what is generated is stored, too, every so many tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.cache import Look, cache_reduction
from tokred.methods.zipcache import zipcache
from tokred.models import Decoder, DecoderConfig
from tokred.models.generate import generate
from tokred.plan import Plan

B, N, STEPS, GAP = 2, 9, 11, 4
CONFIG = DecoderConfig(
    vocab=29, width=16, depth=1, heads=4, kv_heads=2, hidden=24, context=40
)  # fmt: skip
MODEL = Decoder(CONFIG, rngs=nnx.Rngs(0))
IDS = jax.random.randint(jax.random.key(1), (B, N + STEPS), 0, 29)
PROMPTS = (N, N - 4)
PAUSE = 2  # the step in which the second example reads nothing
EIGHT = zipcache(CONFIG.layout, high=8, low=8, gap=GAP)
close = functools.partial(np.testing.assert_allclose, rtol=0.0)


@functools.cache
def read(plan: Plan) -> list[Any]:
    """The first layer's cache after the prompt and after every further token, which are given."""
    cache = MODEL.make_cache(B, N + STEPS, plan=plan, prompt=N)
    extend = functools.partial(MODEL.extend, plan=plan.with_twin("causal"))
    valid = jnp.arange(N)[None] < jnp.array(PROMPTS)[:, None]
    _, cache, _ = jax.jit(functools.partial(extend, fresh=True))(IDS[:, :N], cache, valid=valid)
    found, step = [cache.layers[0]], jax.jit(extend)
    for t in range(STEPS):
        valid = jnp.array([[True], [t != PAUSE]])
        _, cache, _ = step(IDS[:, N + t : N + t + 1], cache, valid=valid)
        found.append(cache.layers[0])
    return found


def view(plan: Plan, cache: Any) -> Any:
    method = cache_reduction(plan)
    return method.read(cache, Look(None, None, lambda q, position, cache: q))


def lengths(step: int) -> tuple[int, int]:
    return PROMPTS[0] + step, PROMPTS[1] + step - (step > PAUSE)


def test_nothing_is_lost_and_codes_are_of_what_was_written():
    """The tail is empty after every fourth token of an example, and all that was stored twice or
    three times is within a few steps of 1 / 255 of its range."""
    for step, (cache, full) in enumerate(zip(read(EIGHT), read(Plan()), strict=True)):
        seen = view(EIGHT, cache)
        for example, length in enumerate(lengths(step)):
            tail = (length - PROMPTS[example]) % GAP
            assert (cache.length[example] == tail).all() and not cache.dropped.any()
            for head in range(2):
                place = np.asarray(seen.position[example, head])
                order = np.argsort(np.where(place < 0, np.inf, place))[:length]
                np.testing.assert_array_equal(place[order], np.arange(length))
                for name in ("k", "v"):
                    mine = np.asarray(getattr(seen, name))[example, head, order]
                    close(mine, getattr(full, name)[example, head, :length], atol=0.02)


def newest_query(example: int, length: int, token: int) -> np.ndarray:
    """[H E] of the last of so many tokens."""
    block, ids = MODEL.blocks[0], IDS[example : example + 1, token : token + 1]
    x = block.norm1(MODEL.embed(ids))
    return np.asarray(block.attn.project(x, jnp.full((1, 1, 1), length - 1.0))[0][0, 0])


@pytest.mark.parametrize(("step", "example"), [(4, 0), (8, 0), (5, 1), (9, 1)])
def test_salient_is_what_the_newest_query_looks_at(step: int, example: int):
    """Three of four, by the attention of a cache of full precision, each key head for itself; what
    was stored before stays of its kind."""
    before, after, length = *read(EIGHT)[step - 1 : step + 1], lengths(step)[example]
    q = newest_query(example, length, N + step - 1)
    k = np.asarray(read(Plan())[step].k[example, :, :length])
    for head in range(2):
        weight = np.exp(q[2 * head : 2 * head + 2] @ k[head].T / 2.0)
        mean = (weight / weight.sum(-1, keepdims=True)).mean(0)[-GAP:]
        newest = length - GAP + np.argsort(-mean)
        for part, chosen in enumerate((newest[:3], newest[3:])):
            old, new = (np.asarray(c.extra[part].position[example, head]) for c in (before, after))
            held = np.concatenate([old[old >= 0], chosen])
            np.testing.assert_array_equal(np.sort(new[new >= 0]), np.sort(held))


@pytest.mark.slow
def test_slots_of_full_precision_do_not_grow_with_the_text():
    plans = [zipcache(CONFIG.layout, gap=gap) for gap in (None, 8)]
    grows, stays = (generate(MODEL, IDS[:, :N], steps=24, plan=plan).cache for plan in plans)
    assert (grows.layers[0].capacity, stays.layers[0].capacity) == (24, 8)
    assert stays.nbytes() < 0.8 * grows.nbytes()


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="gap=0"):
        zipcache(CONFIG.layout, gap=0)
    cache = MODEL.make_cache(B, N + STEPS, plan=EIGHT, prompt=N)
    extend = functools.partial(MODEL.extend, plan=EIGHT.with_twin("causal"))
    _, cache, _ = extend(IDS[:, :N], cache, fresh=True)
    with pytest.raises(ValueError, match="zipcache: 3 tokens at once"):
        extend(IDS[:, :3], cache)
