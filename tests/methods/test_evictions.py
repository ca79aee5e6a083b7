"""Evictions in a decoder: what stays, where it stands, and how much room it takes."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.cache import Look, cache_reduction, score_by_lag
from tokred.cache.pages import page_bounds
from tokred.methods.adakv import adakv
from tokred.methods.h2o import h2o
from tokred.methods.kivi import kivi
from tokred.methods.quest import quest
from tokred.methods.streaming_llm import StreamingLLM, streaming_llm
from tokred.methods.zipcache import zipcache
from tokred.models import Decoder, DecoderConfig
from tokred.models.generate import generate
from tokred.plan import Plan

B, N, STEPS = 3, 12, 6
CONFIG = DecoderConfig(
    vocab=13, width=16, depth=2, heads=4, kv_heads=2, hidden=24, context=32
)  # fmt: skip
MODEL = Decoder(CONFIG, rngs=nnx.Rngs(0))
IDS = jax.random.randint(jax.random.key(1), (B, N), 0, 13)
VALID = jnp.arange(N)[None] >= jnp.array([0, 3, 7])[:, None]
LAYOUT = CONFIG.layout
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
PLANS = {
    "h2o": lambda **how: h2o(LAYOUT, **how),
    "streaming_llm": lambda **how: streaming_llm(LAYOUT, sinks=2, **how),
}


@functools.cache
def _run(plan: Plan, padded: bool):
    run = jax.jit(lambda ids, valid: generate(MODEL, ids, steps=STEPS, plan=plan, valid=valid))
    return run(IDS, VALID if padded else None)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_with_room_for_all_nothing_changes(name: str, padded: bool):
    got = _run(PLANS[name](budget=N + STEPS, spare=1), padded)
    want = _run(Plan(), padded)
    close(got.logits, want.logits)
    assert not got.cache.layers[0].dropped.any()


@pytest.mark.parametrize("name", PLANS)
def test_no_more_than_the_budget_and_what_is_read_is_held(name: str):
    got = _run(PLANS[name](budget=5), True)
    assert [c.capacity for c in got.cache.layers] == [6, 6]
    assert all((c.length == 5).all() for c in got.cache.layers)
    assert got.cache.nbytes() == 2 * 2 * B * 2 * 6 * 4 * 4  # k and v, layers, B G C E, float32
    assert not got.cache.layers[0].dropped.any()


@pytest.mark.parametrize("name", PLANS)
def test_padding_changes_nothing(name: str):
    """The last row alone, without its padding; a budget in entries does not know of padding."""
    plan = PLANS[name](budget=4)
    alone = generate(MODEL, IDS[2:, 7:], steps=STEPS, plan=plan)
    close(_run(plan, True).logits[2:], alone.logits)


def test_streaming_stands_without_gaps():
    cache = _run(PLANS["streaming_llm"](budget=5), False).cache
    place = jnp.sort(cache.layers[0].position, axis=-1)
    assert (place == jnp.arange(-1.0, 5.0)[None, None]).all() and (cache.seen == 5).all()


def test_streaming_is_a_window_that_slides():
    """Every step is that of a prompt of sinks and window alone, up to what layers passed on."""
    shallow = DecoderConfig(vocab=13, width=16, depth=1, heads=2, hidden=24, context=32)
    model = Decoder(shallow, rngs=nnx.Rngs(2))
    plan = streaming_llm(shallow.layout, budget=5, sinks=2)
    out = generate(model, IDS, steps=STEPS, plan=plan)
    text = jnp.concatenate([IDS, out.ids], axis=1)
    for step in range(1, STEPS):
        seen = N + step
        window = jnp.concatenate([text[:, :2], text[:, seen - 4 : seen]], axis=1)
        close(out.logits[:, step], model(window)[0][:, -1])


def test_a_share_is_of_the_prompt():
    cache = _run(PLANS["h2o"](keep=0.5), False).cache
    assert [c.capacity for c in cache.layers] == [N // 2 + 1] * 2


def test_entries_leave_in_blocks():
    got = _run(PLANS["h2o"](budget=5, spare=3), False).cache.layers[0]
    assert got.capacity == 8 and ((got.length >= 5) & (got.length < 8)).all()


def test_nothing_leaves_after_the_prompt():
    got = _run(PLANS["h2o"](budget=5, spare=None), False).cache.layers[0]
    assert got.capacity == 5 + STEPS and (got.length == 5 + STEPS).all()


def test_more_bits_are_closer_and_take_more_bytes():
    full, gaps, held = _run(Plan(), True), [], []
    for bits in (1, 2, 8):
        got = _run(kivi(LAYOUT, bits=bits, group=4, residual=8), True)
        gaps.append(float(jnp.abs(got.logits[:, 1] - full.logits[:, 1]).mean()))
        held.append(got.cache.nbytes())
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.02 and held == sorted(held)


def test_codes_are_of_what_was_written():
    """Twelve tokens of a prompt and six more, in blocks of four: the keys of 16, values of 14."""
    plan = kivi(LAYOUT, bits=8, group=4, residual=4)
    method, full = cache_reduction(plan), _run(Plan(), False).cache.layers[0]
    assert method is not None
    look = Look(None, None, lambda q, position, cache: q)
    view = method.read(_run(plan, False).cache.layers[0], look)
    assert (view.position[..., :18] == full.position).all() and view.k.shape[2] == 20
    for mine, theirs in ((view.k, full.k), (view.v, full.v)):
        np.testing.assert_allclose(mine[:, :, :12], theirs[:, :, :12], atol=0.02)
    same = (_run(plan, False).ids == _run(Plan(), False).ids).all(-1)
    np.testing.assert_allclose(view.k[same][:, :, :18], full.k[same], atol=0.05)
    np.testing.assert_allclose(view.v[same][:, :, :18], full.v[same], atol=0.05)
    assert same.any()


def test_pages_are_those_of_the_newest_key_too():
    """What is stored of a page as tokens come is what all of its keys give."""
    plan = quest(LAYOUT, budget=6, page=4, dense=0)
    cache = _run(plan, True).cache.layers[1]
    low, high = page_bounds(cache.k, 4, cache.valid)
    close(cache.extra[0], low)
    close(cache.extra[1], high)
    assert cache.capacity == 20


def test_the_page_being_filled_is_read_though_its_keys_are_small():
    """20 slots, 18 in use: slots 16 and 17 are the newest page, whose keys promise nothing."""
    cache, q = _run(quest(LAYOUT, page=4, dense=0), False).cache.layers[1], jnp.ones((B, 1, 4, 4))
    small = replace(cache, k=cache.k.at[:, :, 16:].set(0.0))
    look = Look(q, small.position[:, 0, 17:18], MODEL.blocks[1].weigh, layer=1, depth=2)
    for newest in (True, False):
        plan = quest(LAYOUT, budget=12, page=4, dense=0, newest=newest)
        how: Any = plan.steps[0][1]
        read = how.read(how.settle(small), look)
        assert read.k.shape[2] == 12
        assert (read.position == 17).any(-1).all() == newest


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="budget of 4 must exceed the 4"):
        StreamingLLM(4)
    with pytest.raises(ValueError, match="budget=0 must be"):
        StreamingLLM(0)
    with pytest.raises(ValueError, match="spare=0"):
        StreamingLLM(9, 0)
    with pytest.raises(ValueError, match="must be one of"):
        StreamingLLM(9, positions="shift")
    plan = PLANS["h2o"](budget=5)
    with pytest.raises(ValueError, match="one CacheReduction"):
        MODEL.make_cache(B, N, plan=plan + plan)
    cache = MODEL.make_cache(B, N, plan=plan)
    with pytest.raises(ValueError, match="3 tokens at once find 1 free"):
        MODEL.extend(IDS[:, :3], cache, plan=plan.with_twin("causal"))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (kivi(LAYOUT, group=4, residual=8), "kivi: 3 tokens at once"),
        (quest(LAYOUT, budget=4, page=2, dense=0), "quest: 3 tokens at once"),
        (zipcache(LAYOUT), "zipcache: nothing is stored yet"),
    ],
)
def test_what_reads_a_prompt_as_a_whole_says_so(plan: Plan, words: str):
    cache = MODEL.make_cache(B, N + STEPS, plan=plan, prompt=N)
    with pytest.raises(ValueError, match=words):
        MODEL.extend(IDS[:, :3], cache, plan=plan.with_twin("causal"))


def test_options_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="multiple of group=3"):
        kivi(LAYOUT, group=3, residual=8)
    with pytest.raises(ValueError, match="heads of 4 channels are no groups of 8"):
        MODEL.make_cache(B, N, plan=kivi(LAYOUT, group=8, residual=8))
    with pytest.raises(ValueError, match="page=0"):
        quest(LAYOUT, page=0)
    with pytest.raises(ValueError, match=r"salient=1\.5"):
        zipcache(LAYOUT, salient=1.5)


def test_a_pool_holds_the_best_of_all_heads():
    """Two key heads and a budget of four: eight entries, of every head at least one, and the newest
    of each are its own."""
    plan = adakv(LAYOUT, budget=4, window=2, kernel=3, floor=0.3)
    got, full = _run(plan, True), _run(Plan(), True).cache.layers[0]
    cache = got.cache.layers[0]
    assert cache.k.shape[1] == 1 and cache.capacity == 2 * (4 + STEPS)
    per_head = jnp.stack([(cache.valid & (cache.owner == g)).sum((1, 2)) for g in (0, 1)], -1)
    assert (per_head.sum(-1) == 8 + 2 * STEPS).all() and (per_head >= 1 + STEPS).all()
    same = (cache.position[..., None] == full.position[:, :, None, :]).astype(jnp.float32)
    mine = jnp.take_along_axis(
        jnp.einsum("bgct,bgte->bcge", same, full.k), cache.owner[:, 0, :, None, None], axis=2
    )[:, :, 0]
    length = VALID.sum(-1)[:, None]
    prompt = cache.valid[:, 0] & (cache.position[:, 0] < length)
    close(jnp.where(prompt[..., None], cache.k[:, 0], 0.0), jnp.where(prompt[..., None], mine, 0.0))


def test_a_pool_is_read_by_several_queries_at_once():
    """Three tokens behind a prompt, in one go and one by one."""
    plan = adakv(LAYOUT, budget=4, window=2, kernel=3)
    decode = functools.partial(MODEL.extend, plan=plan.with_twin("causal"))
    cache = MODEL.make_cache(B, N + 3, plan=plan, prompt=N)
    _, cache, _ = decode(IDS, cache, fresh=True)
    at_once, _, _ = decode(IDS[:, :3], cache)
    for t in range(3):
        logits, cache, _ = decode(IDS[:, t : t + 1], cache)
        close(logits[:, 0], at_once[:, t])


def test_lagkv_keeps_the_latest_where_nothing_has_all_its_successors():
    """Rows of 20 and 40 entries, two sinks, parts of 16: the shorter one has no whole pair."""
    k, v = jax.random.normal(jax.random.key(0), (2, 2, 40, 4))
    valid = jnp.arange(40)[None] < jnp.array([[20], [40]])
    scores = score_by_lag(k, v, lag=16, sinks=2, valid=valid)
    alone = score_by_lag(k[:, :20], v[:, :20], lag=16, sinks=2)
    assert jnp.isinf(alone[:, :2]).all() and (jnp.diff(alone[:, 2:]) > 0).all()
    np.testing.assert_allclose(alone[:, 2:], jnp.broadcast_to(jnp.arange(18) / 18, (2, 18)))
    np.testing.assert_allclose(scores[0, :20], alone[0])
    whole = score_by_lag(k[1:], v[1:], lag=16, sinks=2)[0]
    np.testing.assert_allclose(scores[1], whole)
    assert sorted(16 * whole[2:18]) == list(range(16)) and jnp.isinf(whole[18:]).all()
