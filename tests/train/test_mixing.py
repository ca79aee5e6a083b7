"""Mixup and CutMix: who is mixed with whom, by how much, and how often."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokred.train.mixing import Mixing

B, Y, X, C, K = 8, 12, 10, 2, 5
MIXUP, CUTMIX, BOTH = Mixing(mixup=0.8), Mixing(cutmix=1.0), Mixing(mixup=0.8, cutmix=1.0)


def batch(dtype=jnp.float32):
    images = np.random.default_rng(0).normal(size=(B, Y, X, C))
    return jnp.asarray(images, dtype), jax.nn.one_hot(jnp.arange(B) % K, K)


def traced():
    """Images whose value is their index: what is left of each can be read off."""
    return jnp.broadcast_to(jnp.arange(2.0)[:, None, None, None], (2, Y, X, 1)), jnp.eye(2)


@functools.cache
def many(mixing, count=4000):
    """(pixels, target) of the first of two images under `count` keys."""
    keys = jax.random.split(jax.random.key(7), count)
    images, targets = jax.jit(jax.vmap(mixing, in_axes=(0, None, None)))(keys, *traced())
    return np.asarray(1 - images[:, 0, :, :, 0]), np.asarray(targets[:, 0])


def partial(own):
    return (own > 0) & (own < 1)


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX, BOTH])
def test_pixels_and_targets_are_shared_alike(mixing):
    own, targets = many(mixing)
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(own.mean((1, 2)), targets[:, 0], atol=1e-6)
    assert partial(targets[:, 0]).mean() > 0.9


def test_mixup_blends_with_the_reversed_batch():
    images, targets = batch()
    mixed, blended = jax.jit(MIXUP)(jax.random.key(1), images, targets)
    share = float(blended[0, 0])  # the last image is of another class
    assert 0 < share < 1
    np.testing.assert_allclose(mixed, share * images + (1 - share) * images[::-1], atol=1e-5)
    np.testing.assert_allclose(blended, share * targets + (1 - share) * targets[::-1], atol=1e-6)


def test_cutmix_pastes_one_box_of_the_reversed_batch():
    images, targets = batch()
    mixed, _ = jax.jit(CUTMIX)(jax.random.key(1), images, targets)
    foreign: Any = np.asarray(mixed != images).any(axis=(0, 3))
    rows, columns = foreign.any(1), foreign.any(0)
    np.testing.assert_array_equal(foreign, rows[:, None] & columns)
    assert all(np.abs(np.diff(side.astype(int))).sum() <= 2 for side in (rows, columns))
    np.testing.assert_array_equal(mixed, np.where(foreign[..., None], images[::-1], images))
    assert 0 < foreign.sum() < foreign.size


@pytest.mark.parametrize("alpha", [0.2, 3.0])
def test_lambda_is_of_the_beta_distribution(alpha):
    kept = many(Mixing(mixup=alpha))[1][:, 0]
    assert abs(kept.mean() - 0.5) < 0.03
    assert abs(kept.var() - 1 / (4 * (2 * alpha + 1))) < 0.01


def test_boxes_are_cut_off_at_the_border():
    own, targets = many(CUTMIX)
    # alpha 1: sides s = sqrt(1 - lambda) of density 2s; a centre in [0, 1] leaves s - s^2 / 4.
    area = 2 * (1 / 4 - 2 / (4 * 5) + 1 / (16 * 6))
    assert abs((1 - targets[:, 0]).mean() - area) < 0.02
    corners = np.stack([own[:, i, j] for i in (0, -1) for j in (0, -1)]).mean(1)
    assert (corners > own[:, Y // 2, X // 2].mean() + 0.1).all() and np.ptp(corners) < 0.04


def test_share_of_the_batches():
    changed = many(Mixing(mixup=1.0, share=0.25))[1][:, 0] < 1
    assert abs(changed.mean() - 0.25) < 0.03


def test_switch_between_the_kinds():
    cut = [
        (~partial(many(mixing)[0]).any((1, 2))).mean()
        for mixing in (MIXUP, CUTMIX, BOTH, Mixing(mixup=0.8, cutmix=1.0, switch=0.2))
    ]
    np.testing.assert_allclose(cut, [0, 1, 0.5, 0.2], atol=0.03)


def test_a_batch_that_is_not_mixed_is_unchanged():
    images, targets = batch()
    mixed, blended = jax.jit(Mixing(mixup=1.0, share=1e-6))(jax.random.key(0), images, targets)
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_array_equal(blended, targets)


@pytest.mark.parametrize("off", [Mixing(), Mixing(mixup=1.0, cutmix=1.0, share=0.0)])
def test_off_returns_the_inputs(off):
    images, targets = batch()
    assert not off.active
    got = off(jax.random.key(0), images, targets)
    assert got[0] is images and got[1] is targets


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX, BOTH])
def test_sharded_is_unsharded(mixing):
    split = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    assert split.num_devices == B
    mix = jax.jit(mixing)
    for seed in range(4):
        whole = mix(jax.random.key(seed), *batch())
        parts = mix(jax.random.key(seed), *jax.device_put(batch(), split))
        for a, b in zip(whole, parts, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
            assert b.sharding.is_equivalent_to(split, b.ndim)


def test_dtypes_stay():
    images, targets = BOTH(jax.random.key(0), *batch(jnp.bfloat16))
    assert (images.dtype, targets.dtype) == (jnp.bfloat16, jnp.float32)


def test_static_and_equal_by_value():
    assert Mixing(mixup=0.8) == MIXUP and hash(Mixing(mixup=0.8)) == hash(MIXUP)
    assert MIXUP != CUTMIX and all(m.active for m in (MIXUP, CUTMIX, BOTH))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mixup": -0.1}, "mixup"),
        ({"mixup": float("inf")}, "mixup"),
        ({"cutmix": float("nan")}, "cutmix"),
        ({"share": 1.5}, "mix_share"),
        ({"switch": -1.0}, "mix_switch"),
    ],
)
def test_bad_fields_are_named(change, field):
    with pytest.raises(ValueError, match=rf"config\.loss\.{field}="):
        Mixing(**change)
