"""Cross entropy and the penalty on cost, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.models.vit import ViT, vit_config
from tokred.train.losses import ImageObjective, cross_entropy, macs_penalty, smooth_targets


def test_cross_entropy_by_hand():
    logits, labels = jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.array([0])
    hard, soft = smooth_targets(labels, 3), smooth_targets(labels, 3, smoothing=0.3)
    np.testing.assert_allclose(cross_entropy(logits, hard), np.log(2), rtol=1e-6)
    smooth = 0.7 * np.log(2) + 0.1 * (np.log(2) + 2 * np.log(4))
    np.testing.assert_allclose(cross_entropy(logits, soft), smooth, rtol=1e-6)


def test_penalty_in_both_units():
    share = macs_penalty(60.0, 100.0, target=0.5, weight=3.0)
    np.testing.assert_allclose(share, 3 * 0.1**2, rtol=1e-5)
    giga = macs_penalty(4e9, 9e9, target=2.9, weight=5.0, unit="giga")
    np.testing.assert_allclose(giga, 5 * 1.1**2, rtol=1e-5)


@pytest.mark.parametrize("change", [{"unit": "mega"}, {"target": 0.0}, {"target": 1.5}])
def test_bad_targets_are_named(change):
    with pytest.raises(ValueError, match="loss"):
        ImageObjective(**change)


def test_models_of_more_macs_than_an_int32_holds():
    config = vit_config("vit_b16")
    rows = {"image": jnp.zeros((1, 224, 224, 3)), "label": jnp.zeros(1, jnp.int32)}

    def loss():
        return ImageObjective()(ViT(config, rngs=nnx.Rngs(0)), rows, jax.random.key(0), {}, {})

    assert jax.eval_shape(loss)[1][0]["macs_ratio"].dtype == jnp.float32
