"""A-ViT: weights of states, cost, who is seen, overflow, and what its losses ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.gates import PonderHalting
from tokred.methods import make_plan
from tokred.methods.avit import UNSEEN, AViT, depth_target, halting_profile, profile_loss
from tokred.models import ViT, ViTConfig
from tokred.report import Call
from tokred.tokens import make_tokens

CONFIG = ViTConfig(image_size=(12, 12), patch=(4, 4), width=16, depth=4, heads=2, classes=3)
IMAGES = jax.random.normal(jax.random.key(0), (3, 12, 12, 3))
PLAN = make_plan("avit", CONFIG.layout, keep=0.6, scale=2.0, centre=0.0)


def logit(chance) -> jax.Array:
    chance = jnp.asarray(chance)
    return jnp.log(chance / (1 - chance))


def halt(chances, eps=0.01):
    """Values and told of each update of a gate whose chances are these, the last one aside."""
    state, values, told = PonderHalting().init(), [], []
    for i, row in enumerate(chances):
        gate = PonderHalting(1.0, 0.0, eps, last=i == len(chances) - 1)
        value, state, more = gate.update(logit(row), state)
        values.append(value)
        told.append(more)
    return jnp.stack(values), state, told


def test_a_state_counts_for_its_chance_and_the_last_one_for_the_rest():
    chances = [[[0.3, 0.995, 0.5, 0.1]], [[0.5, 0.2, 0.6, 0.1]], [[0.9, 0.9, 0.9, 0.1]]]
    values, state, told = halt(chances)
    wanted = [[0.3, 1, 0.5, 0.1], [0.5, 0, 0.5, 0.1], [0.2, 0, 0, 0.8]]
    np.testing.assert_allclose(values[:, 0], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values.sum(0), 1.0, rtol=1e-5)
    layers = sum(np.asarray(more["active"], int) for more in told)
    np.testing.assert_array_equal(layers, [[3, 1, 2, 3]])
    np.testing.assert_allclose(state["ponder"], [[3.2, 2, 2.5, 3.8]], rtol=1e-5)
    np.testing.assert_allclose(told[2]["chance"], chances[2], rtol=1e-5)  # not the 1 it counts as


def test_exactly_at_the_threshold_the_rest_is_lost():
    """As in the released code: neither branch takes it."""
    gate = PonderHalting(1.0, 0.0, 0.25)
    state = {"sum": jnp.full((1, 1), 0.25), "rest": jnp.ones((1, 1)), "ponder": jnp.zeros((1, 1))}
    value, after, _ = gate.update(jnp.zeros((1, 1)), state)  # 0.25 + 0.5
    assert not value.any() and not gate.active(after).any()


def step(chances, *, twin, capacity=3, layer=0, **fields):
    x = jnp.concatenate([logit(chances)[..., None], jnp.ones((*np.shape(chances), 1))], axis=-1)
    reduction = AViT(layer, 2, capacity, PonderHalting(1.0, 0.0, last=layer == 1))
    return reduction(make_tokens(x, prefix=1, **fields), {}, twin=twin)


CHANCES = [[0.999, 0.2, 0.999, 0.5, 0.1, 0.4], [0.2, 0.999, 0.999, 0.3, 0.999, 0.999]]


def test_who_has_halted_is_no_key():
    tokens, map_, _, aux = step(CHANCES, twin="soft")
    assert map_ is None and tokens.n == 6
    np.testing.assert_array_equal(tokens.bias == UNSEEN, jnp.array(CHANCES) > 0.99)
    assert aux["active"].all()


def test_halted_tokens_leave_and_of_too_many_those_nearest_to_halting():
    """A class token that has halted stays in its slot, unseen."""
    tokens, map_, _, aux = step(CHANCES, twin="packed")
    np.testing.assert_array_equal(map_.index[0], [0, 1, 4, 5])
    assert map_.index[1][map_.valid[1]].tolist() == [0, 3]
    assert aux["overflow"].tolist() == [1, 0]
    np.testing.assert_array_equal(tokens.bias[:, 0], [UNSEEN, 0])
    np.testing.assert_allclose(tokens.extra["avit_sum"][0], [0.999, 0.2, 0.1, 0.4], rtol=1e-5)


def test_padding_never_stays():
    valid = jnp.arange(6)[None] < jnp.array([[4], [6]])
    tokens, map_, _, aux = step(CHANCES, twin="packed", valid=valid)
    assert map_.index[0][map_.valid[0]].tolist() == [0, 1, 3]
    assert not (aux["active"] & ~valid).any()
    assert aux["overflow"].tolist() == [0, 0] and tokens.n == 4


def test_the_result_is_the_mean_of_all_states():
    """Behind the last layer, for tokens that halted before it, too; then all are seen again."""
    first, _, _, _ = step(CHANCES, twin="soft")
    late = first.replace(x=10 * first.x)
    gate = PonderHalting(1.0, 0.0, last=True)
    out, map_, _, _ = AViT(1, 2, 3, gate)(late, {}, twin="soft")
    chance = jnp.array(CHANCES)[..., None]
    share = jnp.where(chance > 0.99, 1.0, chance)
    np.testing.assert_allclose(out.x, share * first.x + (1 - share) * late.x, rtol=1e-4)
    assert map_ is None and not out.bias.any()
    assert set(out.extra) == {"avit_ponder"}


def test_halted_tokens_change_no_other():
    """Whatever becomes of a halted patch, the class token's logits do not."""
    model = nnx.jit(lambda: ViT(CONFIG, rngs=nnx.Rngs(0)))()
    gate = PonderHalting(20.0, 0.0)

    @jax.jit
    def run(noise):
        tokens = model.tokens(IMAGES)
        tokens, _, _, _ = AViT(0, 4, 3, gate)(tokens, {}, twin="soft")
        halted = ~gate.active({"sum": tokens.extra["avit_sum"]}).at[:, 0].set(True)
        moved = tokens.replace(x=tokens.x + noise * halted[..., None])
        q, k, v = model.blocks[0].project(moved)
        return model.blocks[0].attend(q, k, v, moved, moved), halted

    (calm, halted), (wild, _) = run(0.0), run(5.0)
    assert 0 < int(halted.sum()) < halted.size
    np.testing.assert_allclose(wild[~halted], calm[~halted], rtol=1e-4, atol=1e-5)


def test_the_target_has_most_before_its_peak():
    target = depth_target(12, 8)
    assert target[:8].sum() == pytest.approx(0.98) and target.argmax() == 8
    assert target[9] == pytest.approx(target[7])


def test_the_profile_is_pulled_to_the_target():
    target = np.array([0.1, 0.2, 0.4, 0.3])
    assert float(profile_loss(jnp.asarray(5 * target), target)) == pytest.approx(0.0, abs=1e-6)
    flat = jnp.ones(4)
    wanted = (target * np.log(target / 0.25)).sum() / 4
    assert float(profile_loss(flat, target)) == pytest.approx(wanted, rel=1e-5)
    slope = jax.grad(profile_loss)(flat, target)
    assert (slope[2] < 0) and (slope[0] > 0)


def test_a_target_that_vanishes_is_finite():
    assert np.isfinite(profile_loss(jnp.ones(60), depth_target(60, 8)))


def test_the_profile_is_the_mean_over_valid_tokens():
    chances = jnp.array([[[0.2, 0.4], [0.6, 0.8]], [[1.0, 0.0], [9.0, 9.0]]])
    valid = jnp.array([[True, True], [True, False]])
    np.testing.assert_allclose(halting_profile(chances, valid), [0.6, 0.4], rtol=1e-6)


def test_losses_are_of_soft_training_alone():
    """A batch of one image, which the official profile divides by 0, has finite ones."""
    model = nnx.jit(lambda: ViT(CONFIG, rngs=nnx.Rngs(0)))()

    def losses(twin, train):
        run = jax.jit(lambda x: model(x, plan=PLAN.with_twin(twin), call=Call(train=train))[1])
        return run(IMAGES[:1]).losses

    found = losses("soft", True)
    assert set(found) == {"after_3/loss_ponder", "after_3/loss_profile"}
    assert all(np.isfinite(value) for value in found.values())
    assert found["after_3/loss_ponder"] > 5e-4  # every token takes one layer at least
    assert losses("soft", False) == {} == losses("packed", True)


def test_bad_options():
    with pytest.raises(ValueError, match=r"eps=0\.0 must lie in \(0, 1\)"):
        make_plan("avit", CONFIG.layout, eps=0.0)
