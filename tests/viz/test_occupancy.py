"""Caches and schedules as pictures, and the counts behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred import Decoder, DecoderConfig, generate, make_plan
from tokred.viz import plot_occupancy, plot_schedules

CONFIG = DecoderConfig(vocab=11, width=16, depth=2, heads=4, kv_heads=2, context=32)
PROMPT = jnp.arange(12)[None] % 11
ADAKV = make_plan("adakv", CONFIG.layout, budget=6, window=2)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def watched(model, plan, **how):
    watch = lambda cache: cache.entries(2)  # noqa: E731
    run = lambda model, ids: generate(model, ids, steps=3, plan=plan, watch=watch, **how)  # noqa: E731
    return jax.jit(run)(model, PROMPT)


def test_a_whole_cache_grows_by_one(model):
    out = watched(model, make_plan("dense", CONFIG.layout))
    assert (out.watched[0] == jnp.array([13, 14, 15])[:, None, None]).all()


def test_a_budget_is_the_same_for_all_heads(model):
    out = watched(model, make_plan("streaming_llm", CONFIG.layout, budget=6))
    np.testing.assert_array_equal(out.watched[0], np.full((3, 2, 2), 6))


def test_heads_of_a_pool_share_theirs(model):
    out = watched(model, ADAKV)
    held = np.asarray(out.watched[0])
    np.testing.assert_array_equal(held[-1].sum(-1), out.cache.layers[0].length.sum())
    np.testing.assert_array_equal(np.diff(held, axis=0), 1)
    assert (held[:, :, 0] != held[:, :, 1]).any()


def test_nothing_is_read_after_the_end(model):
    whole = watched(model, ADAKV)
    out = watched(model, ADAKV, end=int(whole.ids[0, 1]))
    held = np.asarray(out.watched[0]).sum(-1)
    np.testing.assert_array_equal(held[2], held[1])


def test_nothing_is_watched_unasked(model):
    assert generate(model, PROMPT, steps=1).watched is None


def test_pictures_are_written(model, tmp_path):
    out = watched(model, ADAKV)
    plot_occupancy(out.watched[0], tmp_path / "cache.png", start=12)
    plans = {name: make_plan(name, CONFIG.layout) for name in ("dense", "mod")}
    plot_schedules(plans, CONFIG.layout_of(12), tmp_path / "schedules.png")
    for name in ("cache", "schedules"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="watch at least one step"):
        plot_occupancy(np.zeros((0, 2, 2), np.int32), tmp_path / "cache.png")
    with pytest.raises(ValueError, match="plans are empty"):
        plot_schedules({}, CONFIG.layout, tmp_path / "schedules.png")
