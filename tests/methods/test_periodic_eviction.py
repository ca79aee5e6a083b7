"""Evictions that go on while decoding, every so many steps; and where the rest then stands."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.cache import Eviction, Look, cache_reduction, hold
from tokred.methods.adakv import AdaKV
from tokred.methods.expected_attention import expected_attention
from tokred.methods.h2o import observed_attention
from tokred.methods.key_scores import cur, keydiff, lagkv
from tokred.methods.snapkv import pyramidkv, snapkv
from tokred.methods.streaming_llm import streaming_llm
from tokred.models import Decoder, DecoderConfig
from tokred.models.generate import generate
from tokred.ops import cached_probs
from tokred.plan import Plan

B, N, STEPS, K, SPARE = 2, 8, 9, 6, 3
CONFIG = DecoderConfig(
    vocab=29, width=16, depth=1, heads=4, kv_heads=2, hidden=24, context=32
)  # fmt: skip
MODEL = Decoder(CONFIG, rngs=nnx.Rngs(0))
IDS = jax.random.randint(jax.random.key(1), (B, N + STEPS), 0, 29)
PROMPTS = (N, N - 4)  # the second has room left
PLANS = {
    "snapkv": snapkv(CONFIG.layout, budget=K, window=2, kernel=3, spare=SPARE),
    "expected": expected_attention(
        CONFIG.layout, budget=K, sinks=1, future=8, asked=4, spare=SPARE
    ),
    "keydiff": keydiff(CONFIG.layout, budget=K, recent=1, spare=SPARE),
    "cur": cur(CONFIG.layout, budget=K, sinks=1, spare=SPARE),
    "lagkv": lagkv(CONFIG.layout, budget=K, sinks=1, lag=2, spare=SPARE),
}


@functools.cache
def read(plan: Plan) -> list[Any]:
    """The first layer's cache after the prompt and after every further token, which are given."""
    cache = MODEL.make_cache(B, N + STEPS, plan=plan, prompt=N)
    extend = functools.partial(MODEL.extend, plan=plan.with_twin("causal"))
    rows = [np.r_[0 : N - n, 0:n] for n in PROMPTS]  # padding in front
    ids = jnp.stack([IDS[i, row] for i, row in enumerate(rows)])
    valid = jnp.arange(N)[None] >= N - jnp.array(PROMPTS)[:, None]
    _, cache, _ = jax.jit(functools.partial(extend, fresh=True))(ids, cache, valid=valid)
    found, step = [cache.layers[0]], jax.jit(extend)
    for t in range(STEPS):
        ids = jnp.stack([IDS[i, n + t : n + t + 1] for i, n in enumerate(PROMPTS)])
        _, cache, _ = step(ids, cache)
        found.append(cache.layers[0])
    return found


@functools.cache
def projected():
    place = jnp.broadcast_to(jnp.arange(float(N + STEPS)), (B, N + STEPS))
    return MODEL.blocks[0].project(MODEL.tokens(IDS, None, place))


def best(evict: Eviction, example: int, head: int, held: np.ndarray) -> np.ndarray:
    """What is kept of a prompt of these places, asked by its last queries, all of one key head."""
    q, k, v = (x[example : example + 1] for x in projected())
    mine = lambda x: x[:, held, head : head + 1]  # noqa: E731
    place = jnp.asarray(held, jnp.float32)[None]
    now = held[-1] + 1
    asked = np.arange(now - evict.recalled, now)
    asked = asked[asked >= 0] if evict.recalled else np.array([now - 1])
    weigh = lambda q, at, cache: cached_probs(  # noqa: E731
        q, cache.k, mask=cache.mask(at[..., None])
    )
    last = q[:, asked, 2 * head : 2 * head + 2]
    look = Look(last, jnp.asarray(asked, jnp.float32)[None], weigh, MODEL.blocks[0].rates)
    left = evict.begin(hold(mine(k), mine(v), place), look)
    return np.asarray(left.position[0, 0, :K], int)


@pytest.mark.parametrize("name", PLANS)
def test_every_so_many_steps_as_after_a_prompt(name: str):
    """In one example earlier than in the other, and in each head for itself."""
    evict = cache_reduction(PLANS[name])
    assert isinstance(evict, Eviction)
    found, events = read(PLANS[name]), 0
    held = [[np.sort(x[x >= 0]).astype(int) for x in ex] for ex in np.asarray(found[0].position)]
    for step in range(1, STEPS + 1):
        for example in range(B):
            for head in range(2):
                more = np.append(held[example][head], PROMPTS[example] + step - 1)
                if len(more) == K + SPARE:
                    more, events = np.sort(best(evict, example, head, more)), events + 1
                held[example][head] = more
                got = np.asarray(found[step].position[example, head])
                np.testing.assert_array_equal(np.sort(got[got >= 0]), more)
    assert events == 2 * (3 + 2) and not found[-1].dropped.any()


def test_heads_keep_entries_of_their_own():
    """Or else the test above could not tell them apart."""
    a, b = np.sort(np.asarray(read(PLANS["snapkv"])[-1].position[0]), axis=-1)
    assert (a != b).any()


def test_layers_keep_their_budgets():
    config = DecoderConfig(vocab=29, width=16, depth=3, heads=2, hidden=24, context=64)
    plan = pyramidkv(config.layout, budget=12, window=2, kernel=3, beta=3.0, spare=4)
    evict, model = cache_reduction(plan), Decoder(config, rngs=nnx.Rngs(2))
    assert isinstance(evict, Eviction)
    ids = jax.random.randint(jax.random.key(3), (1, 30), 0, 29)
    out = jax.jit(lambda: generate(model, ids, steps=9, plan=plan))().cache.layers
    kept = [evict.kept(30, layer, 3) for layer in range(3)]
    assert kept == [20, 12, 4] and [c.capacity for c in out] == [24, 16, 8]
    assert all((c.length == k + 1).all() for c, k in zip(out, kept, strict=True))


@pytest.mark.parametrize("spare", [1, 3])
def test_keys_turned_once_are_keys_turned_at_every_read(spare: int):
    how = {"budget": 5, "sinks": 2, "spare": spare}
    ids = IDS[:, :N]
    one, two = (
        generate(MODEL, ids, steps=STEPS, plan=streaming_llm(CONFIG.layout, positions=p, **how))
        for p in ("renumber", "rerotate")
    )
    np.testing.assert_allclose(one.logits, two.logits, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(one.cache.seen, two.cache.seen)
    assert one.cache.layers[0].raw and not two.cache.layers[0].raw


@pytest.mark.parametrize("positions", ["renumber", "rerotate"])
def test_what_stays_of_a_prompt_stands_without_gaps(positions: str):
    """The same entries as with true positions, and the text goes on behind them."""
    plans = [
        snapkv(CONFIG.layout, budget=K, window=2, kernel=3, positions=p)
        for p in ("keep", positions)
    ]
    true, new = (read(plan)[0] for plan in plans)
    order = lambda cache: np.argsort(np.where(cache.valid, cache.position, 99.0), axis=-1)  # noqa: E731
    rows = lambda cache: np.take_along_axis(np.asarray(cache.v), order(cache)[..., None], 2)  # noqa: E731
    np.testing.assert_array_equal(rows(true), rows(new))
    last = np.sort(np.asarray(read(plans[1])[-1].position), axis=-1)
    np.testing.assert_array_equal(last[0], np.tile(np.arange(K + STEPS), (2, 1)))


def test_what_does_not_go_together_is_an_error():
    how = {"budget": 6, "spare": 2, "positions": "rerotate"}
    with pytest.raises(ValueError, match="what earlier queries refer to"):
        snapkv(CONFIG.layout, window=2, **how)
    with pytest.raises(ValueError, match="what earlier queries refer to"):
        observed_attention(CONFIG.layout, **how)
    with pytest.raises(ValueError, match="adakv: spare=4"):
        AdaKV(40, 4)
