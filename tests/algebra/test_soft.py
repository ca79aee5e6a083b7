"""Soft assignment: whose totals are 1, what is hidden, and the books."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

from tests.algebra.random_maps import normal
from tokred import select

B, K, N = 2, 3, 7
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
LOGITS = normal(np.random.default_rng(0), B, K, N)
VALID = jnp.arange(N)[None] < jnp.array([[7], [5]])
soften = functools.partial(jax.jit, static_argnames=("over", "rounds"))(select.soften)


def test_totals():
    close(soften(LOGITS), jax.nn.softmax(LOGITS, -1))
    close(soften(LOGITS, over="groups"), jax.nn.softmax(LOGITS, -2))
    close(soften(LOGITS, over="none"), jax.nn.sigmoid(LOGITS))


def test_sinkhorn_has_the_official_marginals():
    """Both of 1 / (K + N) in log space, then times K + N."""
    z, u, v = LOGITS, jnp.zeros((B, K)), jnp.zeros((B, N))
    mass = -np.log(K + N)
    for _ in range(4):
        u = mass - logsumexp(z + v[:, None], -1)
        v = mass - logsumexp(z + u[..., None], -2)
    got = soften(LOGITS, over="both", rounds=4)
    close(got, np.exp(z + u[..., None] + v[:, None] - mass))
    close(got.sum(-2), 1.0)


@pytest.mark.parametrize("over", ["tokens", "groups", "both", "none"])
def test_what_is_absent_does_not_matter(over):
    wild = jnp.where(VALID[:, None], LOGITS, jnp.nan)
    got = soften(wild, over=over, rounds=2, valid=VALID)
    close(got[0], soften(LOGITS[:1], over=over, rounds=2)[0])
    close(got[1, :, :5], soften(LOGITS[1:, :, :5], over=over, rounds=2)[0])
    assert not got[1, :, 5:].any()
    none = soften(wild, over=over, rounds=2, valid=jnp.zeros_like(VALID))
    assert not none.any()

    @jax.jit
    @jax.grad
    def slope(z):
        weights = select.soften(z, over=over, rounds=2, valid=VALID)
        return jnp.square(weights).sum()

    found = slope(LOGITS)
    assert np.isfinite(found).all() and found[1, :, :5].any() and not found[1, :, 5:].any()


def test_forbidden_pairs():
    allowed = jnp.ones((1, K, N), bool).at[0, 1, :4].set(False)
    got = soften(LOGITS, over="both", rounds=3, valid=VALID, allowed=allowed)
    assert not got[:, 1, :4].any()
    close(got[0].sum(0), 1.0)


def test_the_books_share_every_token_out():
    weights = soften(LOGITS, valid=VALID)
    map_ = jax.jit(functools.partial(select.share_out, prefix=2))(weights, valid=VALID)
    assert (map_.n, map_.k) == (2 + N, 2 + K)
    size = jnp.concatenate([jnp.ones((B, 2)), 3.0 * VALID], axis=1)
    close(map_.sizes(size).sum(-1), size.sum(-1))
    np.testing.assert_array_equal(map_.matrix[:, :2], np.eye(2 + N)[None, :2].repeat(B, 0))
    close(map_.back[0].sum(-1), 1.0)
    assert map_.source[1].tolist()[-2:] == [-1, -1] and (map_.source[0] >= 0).all()


def test_bad_input():
    with pytest.raises(ValueError, match="over='all' must be one of"):
        select.soften(LOGITS, over="all")
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        select.soften(LOGITS, over="both", rounds=0)
