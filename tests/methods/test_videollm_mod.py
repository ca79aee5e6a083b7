"""VideoLLM-MoD: a budget for every frame."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.methods import around
from tests.methods.around import CONFIG, IDS, VALID, N, Setting, close, extend, forward
from tokred.methods import make_plan
from tokred.methods.videollm_mod import FrameMoD
from tokred.tokens import make_tokens

TEXT = [-1, -1]
FRAME = jnp.array([
    [-1, 0, 0, 0, 0, -1, 1, 1, 1, 1, *TEXT * 5],
    [0, 0, 0, 0, 1, 1, 1, 1, -1, 2, 2, 2, *TEXT * 4],  # the last frame lacks a token
    [*TEXT, 0, 0, 0, 0, *TEXT, 7, 7, 7, 7, *TEXT * 4],
])  # fmt: skip
VIDEO = Setting("videollm_mod", {"keep": 0.5, "frame_tokens": 4, "frames": 2}, {"frame": FRAME})


def test_twins_agree():
    around.check_twins_agree(VIDEO)


def test_padding_changes_nothing():
    around.check_padding(VIDEO)


def test_gradients_reach_the_routers():
    around.check_gradients(VIDEO)


@pytest.mark.parametrize("prefill", ["causal", "packed"])
def test_decoding(prefill):
    around.check_decoding(VIDEO, prefill)


def test_all_of_a_frame_is_dense():
    around.check_dense("videollm_mod")


def test_every_frame_has_its_budget():
    _, report = VIDEO.run()
    assert [site.layer for site, _ in VIDEO.plan.steps] == [1, 3]
    for site, _ in VIDEO.plan.steps:
        entered = np.asarray(report.aux[site.name]["entered"])
        assert (entered == VALID)[FRAME < 0].all()
        for row, frames in enumerate(np.asarray(FRAME)):
            for frame in set(frames) - {-1}:
                assert entered[row, frames == frame].sum() == 2
        assert report.counts[site.layer].mlp == N - 4


def layer(reduction: FrameMoD, frame, twin="packed"):
    x = jax.random.normal(jax.random.key(0), (*frame.shape, 6))
    module = reduction.build(6, 2, nnx.Rngs(0))
    tokens = make_tokens(x, extra={"frame": frame})
    return reduction(tokens, {}, module=module, twin=twin), module(x)


def test_raw_scores_weigh_vision_and_one_weighs_text():
    (_, map_, _, aux), score = layer(FrameMoD(0.5, 4), FRAME)
    weight = jnp.where(FRAME >= 0, score, 1.0)
    close(aux["combine"].weight[map_.valid], map_.apply(weight)[map_.valid])
    assert aux["combine"].fill is None and aux["combine"].rule == "residual"
    for twin in ("soft", "causal"):
        (_, _, _, other), _ = layer(FrameMoD(0.5, 4), FRAME, twin)
        np.testing.assert_array_equal(other["entered"], aux["entered"])


def test_overflow_leaves_out_vision_before_text():
    (_, map_, _, aux), _ = layer(FrameMoD(0.25, 4, frames=3), FRAME)  # 11 slots
    np.testing.assert_array_equal(aux["overflow"], [3, 1, 3])
    assert map_.k == 11
    assert not (aux["entered"] & (FRAME >= 0))[0].any()
    (_, _, _, soft), _ = layer(FrameMoD(0.25, 4, frames=3), FRAME, "soft")
    np.testing.assert_array_equal(soft["entered"], aux["entered"])


def test_streaming_frame_by_frame_is_one_pass():
    """Calls that cut between frames; padding only where a frame is shorter than the longest."""
    model, causal = VIDEO.model, VIDEO.plan.with_twin("causal")
    ids, frame = IDS[:1], FRAME[:1]
    full, _ = forward(model, ids, plan=causal, extra={"frame": frame})
    cache, got = model.make_cache(1, N, plan=VIDEO.plan), []
    for start, stop in ((0, 5), (5, 10), (10, 11), (11, N)):
        part = slice(start, stop)
        logits, cache, _ = extend(
            model, ids[:, part], cache, plan=causal, extra={"frame": frame[:, part]}
        )
        got.append(logits)
    close(jnp.concatenate(got, axis=1), full)
    assert [c.capacity for c in cache.layers] == [N, N - 4, N, N - 4]


def test_per_frame():
    assert [FrameMoD(keep, 10).per_frame for keep in (0.01, 0.2, 0.26, 1.0)] == [1, 2, 3, 10]


@pytest.mark.parametrize("changes", [{"ratio": 0.0}, {"frame_tokens": 0}, {"frames": -1}])
def test_bad_options(changes):
    with pytest.raises(ValueError, match=f"videollm_mod: {next(iter(changes))}.*(change|raise)"):
        dataclasses.replace(FrameMoD(0.5, 4), **changes)


def test_bad_input():
    with pytest.raises(ValueError, match="extra="):
        forward(VIDEO.model, IDS, VALID, plan=VIDEO.plan)
    with pytest.raises(ValueError, match="frames=4 of 10 tokens do not fit"):
        make_plan("videollm_mod", CONFIG.layout, frames=4)
