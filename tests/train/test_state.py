"""Flat arrays, what trains, what decays, and the step over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.models.vit import ViT, ViTConfig
from tokred.nn.skeleton import split_model
from tokred.train.losses import ImageObjective
from tokred.train.optimizer import make_optimizer
from tokred.train.setup import WEIGHTS, modules_of
from tokred.train.state import init_state, select_names
from tokred.train.step import make_train_step

CONFIG = ViTConfig(
    image_size=(8, 8), patch=(2, 2), channels=1, width=16, depth=2, heads=2, classes=4
)
SOFT = make_plan("diffrate", CONFIG.layout).with_twin("soft")
RATES = modules_of(SOFT, "")
OPTIMIZER = {"lr": 1e-2, "steps": 4, "warmup": 0.0, "schedule": "constant", "weight_decay": 0.1}


def build():
    return split_model(ViT(CONFIG, plan=SOFT, rngs=nnx.Rngs(0)))


def batch():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(4, 8, 8, 1)).astype(np.float32)
    return {"image": image, "label": np.arange(4, dtype=np.int32)}


def run(pattern, objective, steps=1):
    skeleton, weights = build()
    names, tx = select_names(weights.params, pattern), make_optimizer(**OPTIMIZER)
    state = init_state(jax.tree.map(jnp.copy, weights), tx, names)
    step = make_train_step(skeleton, objective, tx, names)
    for _ in range(steps):
        state, metrics = step(state, batch(), {})
    return weights.params, state, metrics


def test_split_and_merge_are_inverse():
    skeleton, weights = build()
    images = jnp.asarray(batch()["image"])
    model = ViT(CONFIG, plan=SOFT, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(skeleton.merge(*weights)(images)[0], model(images)[0])
    assert "blocks/0/attn/query/kernel" in weights.params
    assert hash(skeleton) == hash(build()[0])


def test_trainable_patterns_part_rates_from_weights():
    params = build()[1].params
    rates, weights = select_names(params, RATES), select_names(params, WEIGHTS)
    assert set(rates) == {"reductions/mid_1/prune", "reductions/mid_1/merge"}
    assert not set(rates) & set(weights)
    assert {*rates, *weights} == set(params) == set(select_names(params, ""))


@pytest.mark.parametrize("pattern", ["^nothing/", "("])
def test_bad_patterns_are_named(pattern):
    with pytest.raises(ValueError, match="trainable="):
        select_names(build()[1].params, pattern)


@pytest.mark.parametrize(
    ("pattern", "objective"),
    [(WEIGHTS, ImageObjective()), (RATES, ImageObjective(SOFT, macs_weight=10.0, target=0.5))],
)
def test_a_step_changes_what_trains_and_nothing_else(pattern, objective):
    before, state, metrics = run(pattern, objective)
    trained = set(select_names(before, pattern))
    same = {n for n in before if np.array_equal(before[n], state["params"][n])}
    assert same >= set(before) - trained
    assert set(before) - same
    moments = {
        n for leaf in jax.tree.leaves(state["opt"], is_leaf=_is_moments) for n in _keys(leaf)
    }
    assert moments == trained
    assert int(state["step"]) == 1 and np.isfinite(metrics["loss"])


def _is_moments(node):
    return isinstance(node, dict)


def _keys(node):
    return node.keys() if isinstance(node, dict) else ()


def test_training_lowers_the_loss():
    first, last = (run(WEIGHTS, ImageObjective(), steps)[2]["loss"] for steps in (1, 8))
    assert last < 0.7 * first


def test_the_penalty_pulls_the_expected_cost_to_the_target():
    objective = ImageObjective(SOFT, macs_weight=100.0, target=0.7)
    first, last = (run(RATES, objective, steps)[2]["macs_ratio"] for steps in (1, 40))
    assert first > last and abs(last - 0.7) < abs(first - 0.7)
