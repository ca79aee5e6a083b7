"""gamma-MoD: ARank, the shared router, and both forms of a routed layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.methods import around
from tests.methods.around import CONFIG, IDS, VALID, B, N, Setting, close, extend, forward
from tokred.methods import make_plan
from tokred.methods.gammamod import (
    CACHED,
    NORMED,
    GammaMoD,
    arank,
    default_layers,
    head_ranks,
    lowest_layers,
    measure_ranks,
)
from tokred.methods.routing import POSITIONS, renumber
from tokred.models import Decoder
from tokred.tokens import make_tokens

LAYERS = {"layers": (1, 3)}
PROTECTED = (jnp.arange(N)[None] >= 9) & (jnp.arange(N)[None] < 12)
EXTRA = {"protected": jnp.broadcast_to(PROTECTED, (B, N))}
TRAIN = Setting("gammamod", {"routable": 9, "protected": 3, **LAYERS}, EXTRA)
KEPT = Setting("gammamod", {"positions": "keep", "shared": False, **LAYERS}, EXTRA)
INFER = Setting("gammamod", {"prefill": 0.6, "threshold": 0.4, **LAYERS})
SETTINGS = pytest.mark.parametrize("setting", [TRAIN, KEPT, INFER], ids=["train", "keep", "infer"])


@SETTINGS
def test_twins_agree(setting):
    around.check_twins_agree(setting)


@SETTINGS
def test_padding_changes_nothing(setting):
    around.check_padding(setting)


@pytest.mark.parametrize("setting", [TRAIN, INFER], ids=["train", "infer"])
def test_gradients_reach_the_routers(setting):
    around.check_gradients(setting)


@SETTINGS
def test_decoding(setting):
    around.check_decoding(setting)


def test_keep_one_is_dense():
    around.check_dense("gammamod", **LAYERS)


def test_one_router_for_all_layers():
    assert list(TRAIN.model.reductions) == ["gammamod"]
    assert sorted(KEPT.model.reductions) == ["around_1", "around_3"]
    assert default_layers(32) == tuple(range(3, 31))
    assert default_layers(5) == (3,)


def test_protected_tokens_enter_and_others_by_chance():
    _, report = TRAIN.run()
    for site, reduction in TRAIN.plan.steps:
        aux = report.aux[site.name]
        assert not aux["overflow"].any()
        assert aux["entered"][EXTRA["protected"]].all()
        np.testing.assert_array_equal(aux["entered"].sum(-1), VALID.sum(-1) - 4)  # floor(9 / 2)
        assert reduction.counts(1071, 0) == 1067
        free = VALID & ~EXTRA["protected"]
        lowest = jnp.where(free & aux["entered"], aux["score"], 1.0).min(-1, keepdims=True)
        assert (aux["score"] <= lowest)[free & ~aux["entered"]].all()


def test_released_count():
    assert GammaMoD(0.5, 1059).counts(1071, 0) == 542  # ceil(1071 - 529.5)
    assert GammaMoD(0.5, 1059).counts(1059, 0) == 1059  # no question, no choice


def test_released_inference_goes_on_where_each_layer_stands():
    """Prefill by threshold, packed; then a token enters a layer at the place after its entries."""
    model, plan = INFER.model, INFER.plan
    cache = model.make_cache(B, N, plan=plan)
    _, cache, report = extend(model, IDS[:, :12], cache, plan=plan, fresh=True)
    entered = report.aux["around_1"]["entered"].sum(-1)
    np.testing.assert_array_equal(cache.occupancy()[:, 1], entered)
    assert (entered < 12).any()
    for step in range(12, 15):
        ids = IDS[:, step : step + 1]
        _, cache, report = extend(model, ids, cache, plan=plan.with_twin("causal"))
        entered = entered + report.aux["around_1"]["entered"][:, 0]
    assert (cache.occupancy()[:, 1] == entered).all()
    np.testing.assert_array_equal(cache.layers[1].position.max((1, 2)), entered - 1)
    np.testing.assert_array_equal(cache.layers[0].position.max((1, 2)), [14] * B)


def layer(reduction: GammaMoD, twin="packed", held=0.0, extra=None):
    x = jax.random.normal(jax.random.key(0), (B, N, 6))
    module = reduction.build(6, 2, nnx.Rngs(0))
    position = jnp.stack([jnp.arange(N) + 5.0, jnp.ones(N)], -1)
    tokens = make_tokens(
        x, valid=VALID, position=jnp.broadcast_to(position, (B, N, 2)), extra=extra or {}
    )
    evidence = {NORMED.name: 3 * x, CACHED.name: jnp.full((B, N), held)}
    return reduction(tokens, evidence, module=module, twin=twin), module(3 * x)


def test_chance_weighs_the_mlp_and_the_router_learns_who_entered():
    (_, map_, _, aux), logits = layer(GammaMoD(0.5), extra=EXTRA)
    chance = jax.nn.softmax(logits)[..., 1]
    close(aux["score"], chance)
    close(aux["combine"].weight[map_.valid], map_.apply(chance)[map_.valid])
    assert aux["combine"].rule == "mlp_branch"
    picked = jnp.where(aux["entered"], chance, 1 - chance)
    close(aux["loss_router"], -0.01 * jnp.log(picked)[VALID].mean())


def test_thresholds():
    (_, _, _, aux), _ = layer(GammaMoD(0.5, prefill=1.0, threshold=0.3))
    np.testing.assert_array_equal(aux["entered"], (aux["score"] > 0.3) & VALID)
    assert "loss_router" not in aux
    (_, map_, _, small), _ = layer(GammaMoD(0.5, prefill=0.2, threshold=0.3))
    assert map_.k == 4
    room = jnp.array([4, 4, 3])  # a fifth of each row's tokens, rounded up
    np.testing.assert_array_equal(small["overflow"], aux["entered"].sum(-1) - room)
    (_, _, _, causal), _ = layer(GammaMoD(0.5), twin="causal")
    np.testing.assert_array_equal(causal["entered"], (aux["score"] >= 0.5) & VALID)


@pytest.mark.parametrize("twin", ["packed", "soft", "causal"])
def test_positions(twin):
    for how in POSITIONS:
        (tokens, map_, _, aux), _ = layer(GammaMoD(0.5, positions=how), twin, held=3.0, extra=EXTRA)
        back, entered = map_.restore(tokens.position, fill=-1.0), aux["entered"]
        place = {"renumber": 2.0 + jnp.cumsum(entered, -1), "keep": jnp.arange(N)[None] + 5.0}
        np.testing.assert_array_equal(back[..., 0], jnp.where(entered, place[how], -1.0))
        assert (back[..., 1] == 1)[entered].all()
    bare = make_tokens(jnp.ones((1, 3, 2)))
    assert renumber(bare, jnp.zeros((1, 1))) is bare


def test_protected_tokens_that_do_not_fit():
    many = {"protected": jnp.ones((B, N), bool)}
    (_, _, _, aux), _ = layer(GammaMoD(0.5), extra=many)
    np.testing.assert_array_equal(aux["overflow"], VALID.sum(-1) // 2)
    with pytest.raises(ValueError, match="protected=11 tokens exceed the 10 of 20"):
        layer(GammaMoD(0.5, protected=11), extra=EXTRA)
    with pytest.raises(ValueError, match="protected=17"):
        make_plan("gammamod", CONFIG.layout, protected=17, **LAYERS)
    (_, _, _, aux), _ = layer(GammaMoD(0.5, protect=False))
    assert not aux["overflow"].any()


def test_rank_of_known_matrices():
    s = 12
    steps = jnp.tril(jnp.ones((s, s)))
    first = jnp.zeros((s, s)).at[:, 0].set(1.0)
    heads = jnp.stack([steps, first, jnp.zeros((s, s)), jnp.eye(s)])
    np.testing.assert_array_equal(head_ranks(heads), [s - 1, 1, 0, 0])
    close(arank(heads), s / 4)


def test_padding_has_no_rank():
    probs = jax.nn.softmax(4 * jax.random.normal(jax.random.key(0), (B, 2, N, N)))
    for valid in (VALID, VALID[:, ::-1]):
        ranks = head_ranks(probs, valid)
        for row, n in enumerate(np.asarray(VALID.sum(-1))):
            part = slice(0, n) if valid[row, 0] else slice(N - n, N)
            np.testing.assert_array_equal(ranks[row], head_ranks(probs[row, :, part, part]))


def test_layers_are_measured_and_chosen():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    ranks = jax.jit(measure_ranks)(model, IDS, valid=VALID)
    assert ranks.shape == (CONFIG.depth,)
    assert (ranks <= N - 1).all()
    chosen = lowest_layers(jnp.array([3.0, 1.0, 2.0, 1.0, 9.0]), 3)
    assert chosen == (1, 2, 3)
    plan = make_plan("gammamod", CONFIG.layout, layers=chosen)
    assert [site.layer for site, _ in plan.steps] == [1, 2, 3]
    with pytest.raises(ValueError, match="count=6"):
        lowest_layers(ranks, 6)


@pytest.mark.parametrize(
    "changes",
    [{"keep": 0.0}, {"prefill": 2.0}, {"cache": 0.0}, {"positions": "new"}, {"routable": 0}],
)
def test_bad_options(changes):
    with pytest.raises(ValueError, match=f"gammamod: {next(iter(changes))}.*(change|raise)"):
        dataclasses.replace(GammaMoD(0.5), **changes)


def test_bad_input():
    with pytest.raises(ValueError, match="extra="):
        forward(TRAIN.model, IDS, VALID, plan=TRAIN.plan)
