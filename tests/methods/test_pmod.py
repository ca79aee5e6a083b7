"""p-MoD: its schedule, its weights, and the layer that vision tokens skip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.methods import around
from tests.methods.around import IDS, VALID, B, N, Setting, close, forward
from tokred.methods import make_plan
from tokred.methods.pmod import ACTIVATIONS, PMoD, router_weights
from tokred.nn.routers import VisionRouter
from tokred.schedule import decaying_ratios, shifted_decay
from tokred.tokens import make_tokens

FIRST, LAST = jnp.array([2, 0, 3])[:, None], jnp.array([12, 11, 12])[:, None]
VISION = (jnp.arange(N)[None] >= FIRST) & (jnp.arange(N)[None] < LAST)  # 10, 11, 9 tokens
PMOD = Setting("pmod", {"targets": 9, "highest": 0.8}, {"vision": VISION}, spread=0.05)
RATIOS = {1: 0.75, 2: 0.25, 3: 0.15}  # a half cosine over four layers, the first one dense


def test_released_schedule():
    ratios = decaying_ratios(32, 0.5)
    assert ratios[:8] == (1.0,) * 8 and all(ratio < 1 for ratio in ratios[8:])
    assert ratios[24:] == (0.15,) * 8
    close(np.mean(ratios), 0.54, atol=5e-3)
    assert list(ratios) == sorted(ratios, reverse=True)


def test_mixture_of_depths_can_decay_likewise():
    plan = make_plan("mod", around.CONFIG.layout, keep=0.5, decay="cosine")
    ratios = decaying_ratios(around.CONFIG.depth, 0.5)
    got = {site.layer: getattr(reduction, "capacity") for site, reduction in plan.steps}  # noqa: B009
    assert got == {i: ratio for i, ratio in enumerate(ratios) if ratio < 1}


def test_schedules_of_any_depth():
    assert shifted_decay(5, 0.5, "linear") == (1.0, 0.75, 0.5, 0.25, 0.0)
    close(shifted_decay(5, 0.5), [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0])
    assert decaying_ratios(5, 0.4, kind="interleave") == (1.0, 0.4, 1.0, 0.4, 1.0)
    assert decaying_ratios(1, 0.3) == (0.8,)
    assert decaying_ratios(3, 1.0) == (1.0, 1.0, 1.0)


def test_twins_agree():
    around.check_twins_agree(PMOD)


def test_padding_changes_nothing():
    around.check_padding(PMOD)


def test_gradients_reach_the_routers():
    around.check_gradients(PMOD)


@pytest.mark.parametrize("prefill", ["causal", "packed"])
def test_decoding(prefill):
    around.check_decoding(PMOD, prefill)


def test_a_ratio_of_one_is_dense():
    around.check_dense("pmod")


def test_counts_and_who_enters():
    _, report = PMOD.run()
    for layer, ratio in RATIOS.items():
        entered, real = report.aux[f"around_{layer}"]["entered"], VISION & VALID
        np.testing.assert_array_equal(
            (entered & real).sum(-1), [int(ratio * v) for v in real.sum(-1)]
        )
        assert (entered == VALID)[~real].all()
        assert report.counts[layer].mlp == N - (9 - int(9 * ratio))


def layer(reduction: PMoD, twin="packed", x=None, vision=None, valid=None):
    x = jax.random.normal(jax.random.key(0), (B, N, 6)) if x is None else x
    module = VisionRouter(6, rngs=nnx.Rngs(0))
    kernel = jax.random.normal(jax.random.key(1), (6, 1))
    module.score.kernel[...] = kernel
    extra = {"vision": VISION if vision is None else vision}
    tokens = make_tokens(x, valid=valid, extra=extra)
    return reduction(tokens, {}, module=module, twin=twin), jnp.tanh(x @ kernel)[..., 0]


def test_skipped_vision_is_scaled_and_text_is_not():
    (_, map_, _, aux), score = layer(PMoD(0.4))
    weight = jnp.where(VISION, 0.2 * score + 1, 1.0)
    close(aux["score"], weight)
    x = jax.random.normal(jax.random.key(0), (B, N, 6))
    close(aux["combine"].fill, x * weight[..., None])
    lowest = jnp.where(VISION & aux["entered"], score, jnp.inf).min(-1, keepdims=True)
    assert (score < lowest)[VISION & ~aux["entered"]].all()
    close(map_.apply(weight), map_.apply(jnp.ones((B, N))) * aux["combine"].weight)


@pytest.mark.parametrize("norm", ACTIVATIONS)
def test_normalisations_are_finite_without_vision(norm):
    logits = jnp.array([[1.0, -2.0, 50.0]])
    nobody = jnp.zeros((1, 3), bool)
    loss = lambda logits, who: jnp.where(  # noqa: E731
        who, router_weights(logits, who, norm=norm), 1.0
    ).sum()
    grad = jax.grad(loss)(logits, nobody)
    assert not grad.any() and jnp.isfinite(grad).all()
    some = jnp.array([[True, True, False]])
    weights = router_weights(logits, some, norm=norm)
    assert weights[0, 0] > weights[0, 1]


def test_overflow_leaves_out_vision_before_text():
    few = jnp.arange(N)[None] < jnp.array([12, 2, 0])[:, None]
    reduction = PMoD(0.5, targets=12)  # 14 slots; the rows need 14, 19, 20
    (_, map_, _, aux), _ = layer(reduction, vision=few)
    np.testing.assert_array_equal(aux["overflow"], [0, 5, 6])
    assert map_.k == 14
    assert not (few & aux["entered"])[1].any()
    (_, _, _, masked), _ = layer(reduction, twin="soft", vision=few)
    np.testing.assert_array_equal(masked["entered"], aux["entered"])
    (_, _, _, causal), _ = layer(reduction, twin="causal", vision=few)
    np.testing.assert_array_equal(causal["overflow"], [0, 0, 0])


def test_a_cache_is_as_small_as_promised():
    cache = PMOD.model.make_cache(B, N, plan=PMOD.plan)
    saved = {layer: 9 - int(9 * ratio) for layer, ratio in RATIOS.items()}
    assert [c.capacity for c in cache.layers] == [N - saved.get(i, 0) for i in range(4)]


@pytest.mark.parametrize(
    "changes", [{"ratio": 0.0}, {"ratio": 1.5}, {"targets": -1}, {"norm": "relu"}]
)
def test_bad_options(changes):
    with pytest.raises(ValueError, match=f"pmod: {next(iter(changes))}.*change|make"):
        dataclasses.replace(PMoD(0.5), **changes)


def test_bad_input():
    with pytest.raises(ValueError, match="extra="):
        forward(PMOD.model, IDS, VALID, plan=PMOD.plan)
    with pytest.raises(ValueError, match="targets=40 vision tokens"):
        make_plan("pmod", around.CONFIG.layout, targets=40)
    with pytest.raises(ValueError, match="lets none enter"):
        make_plan("pmod", around.CONFIG.layout, targets=32, lowest=0.01)
    with pytest.raises(ValueError, match="kind='cos'"):
        make_plan("pmod", around.CONFIG.layout, schedule="cos")
