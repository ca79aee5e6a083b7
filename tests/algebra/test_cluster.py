"""Clusters against plain loops, and what ties, few tokens and outliers do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.algebra.random_maps import normal
from tokred import select

B, N, D = 2, 11, 4
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
X = normal(np.random.default_rng(0), B, N, D)
WEIGHT = jnp.asarray(np.random.default_rng(1).random((B, N)), jnp.float32)


def distances(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x[:, None] - x[None], axis=-1)


def peaks_by_loops(x: np.ndarray, k: int, neighbours: int) -> tuple[list[int], list[int]]:
    """(centres, group of every token)."""
    gap = distances(x) / x.shape[-1] ** 0.5
    density = [np.exp(-np.mean(np.sort(row)[:neighbours] ** 2)) for row in gap]
    scores = []
    for i, row in enumerate(gap):
        denser = [row[j] for j in range(len(x)) if density[j] > density[i]]
        scores.append(density[i] * (min(denser) if denser else gap.max()))
    centres = np.argsort(-np.array(scores), kind="stable")[:k].tolist()
    group = gap[centres].argmin(0).tolist()
    return centres, [centres.index(i) if i in centres else g for i, g in enumerate(group)]


def medoids_by_loops(x: np.ndarray, k: int, weight: np.ndarray, iterations: int):
    gap = distances(x)
    medoids = np.argsort(-weight, kind="stable")[:k].tolist()
    for _ in range(iterations):
        group = gap[medoids].argmin(0)
        for g in range(k):
            members = [i for i in range(len(x)) if group[i] == g]
            medoids[g] = min(members, key=lambda i: weight[i] * gap[i].sum())
    return medoids, gap[medoids].argmin(0)


@functools.partial(jax.jit, static_argnames=("neighbours",))
def by_density(x, valid=None, draws=None, neighbours=3):
    return select.cluster_by_density(x, 4, neighbours=neighbours, valid=valid, draws=draws)


def test_density_peaks():
    map_ = by_density(X)
    for b in range(B):
        centres, group = peaks_by_loops(np.asarray(X[b]), 4, 3)
        assert map_.index[b].tolist() == centres
        assert map_.target[b].tolist() == group
        assert map_.target[b][jnp.array(centres)].tolist() == [0, 1, 2, 3]


def test_few_valid_tokens_have_few_neighbours():
    """Their density is the mean over those that are there; a slot more than tokens is invalid."""
    valid = jnp.arange(N)[None] < jnp.array([[4], [3]])
    map_ = by_density(X, valid, neighbours=6)
    for b, n in enumerate((4, 3)):
        centres, _ = peaks_by_loops(np.asarray(X[b, :n]), n, n)
        assert map_.index[b, :n].tolist() == centres
    assert map_.valid.tolist() == [[True] * 4, [True] * 3 + [False]]


def test_outliers_do_not_underflow_to_ties():
    """Densities of exp(-1e4): in log space the closest pair is still the densest."""
    x = jnp.array([[[0.0], [300.0], [550.0], [1000.0]]])
    map_ = jax.jit(lambda x: select.cluster_by_density(x, 2, neighbours=2))(x)
    assert map_.index.tolist() == [[1, 2]]


def test_draws_break_ties():
    """Of two equal pairs of twins the earlier token counts as denser, or the one that is drawn."""
    x = jnp.array([[[0.0], [0.0], [1.0], [1.0]]])
    run = jax.jit(lambda x, draws: select.cluster_by_density(x, 2, neighbours=2, draws=draws))
    assert run(x, None).index.tolist() == [[0, 2]]
    assert run(x, jnp.array([[0.1, 0.9, 0.1, 0.5]])).index.tolist() == [[1, 3]]


def test_medoids():
    run = jax.jit(lambda x, weight: select.cluster_medoids(x, 3, weight, iterations=2))
    map_ = run(X, WEIGHT)
    for b in range(B):
        medoids, group = medoids_by_loops(np.asarray(X[b]), 3, np.asarray(WEIGHT[b]), 2)
        assert map_.index[b].tolist() == medoids
        assert map_.target[b].tolist() == group.tolist()


def test_farthest_points():
    """From the first valid token on; what was chosen does not come back while others are left."""
    x = jnp.array([[[9.0], [0.0], [1.0], [4.0], [4.0]]])
    gap = jnp.asarray(distances(np.asarray(x[0])))[None]
    run = jax.jit(lambda gap, valid: select.farthest_points(gap, 4, valid=valid))
    assert run(gap, None).tolist() == [[0, 1, 3, 2]]
    assert run(gap, jnp.array([[False, True, True, True, True]])).tolist() == [[1, 3, 2, 4]]
    assert select.farthest_points(gap, 2, first=jnp.array([3])).tolist() == [[3, 0]]


def test_soft_clusters():
    """One step by hand, with a pair that may not meet and a token that is not there."""
    centres, allowed = X[:, :2], jnp.ones((1, 2, N), bool).at[0, 0, 3].set(False)
    valid = jnp.ones((B, N), bool).at[:, 5].set(False)
    run = jax.jit(
        lambda x, n: select.cluster_softly(
            x, centres, iterations=n, temperature=0.7, allowed=allowed, valid=valid
        ),
        static_argnums=1,
    )
    wild = X.at[:, 5].set(jnp.nan)
    once, twice = run(wild, 1), run(wild, 2)
    for b in range(B):
        x, c = np.asarray(X[b], np.float64), np.asarray(centres[b], np.float64)
        for got in (once[b], twice[b]):
            weight = np.exp(-0.7 * ((c[:, None] - x[None]) ** 2).sum(-1))
            weight[0, 3] = 0
            weight = weight / weight.sum(0)
            weight[:, 5] = 0
            close(got, weight)
            c = weight @ x / weight.sum(1, keepdims=True)


@pytest.mark.parametrize("norm", ["l2", "sum"])
def test_what_comes_back(norm):
    """Of the two nearest centres that are there; far away too, where weights underflow."""
    x = jnp.array([[[0.0], [1.0], [500.0]]])
    centres, there = jnp.array([[[0.0], [2.0], [3.0], [0.5]]]), jnp.array([[True, True, True, 0]])
    back = jax.jit(
        lambda x: select.spread_back(
            x, centres, neighbours=2, temperature=0.5, norm=norm, there=there.astype(bool)
        )
    )(x)
    want = np.exp(-0.5 * np.array([[0.0, 4, np.inf], [1, 1, np.inf], [np.inf, 497**2, 497**2]]))
    want[2] = np.exp(-0.5 * np.array([np.inf, 498.0**2 - 497**2, 0]))
    order = 2 if norm == "l2" else 1
    want = want / np.linalg.norm(want, order, axis=1, keepdims=True)
    close(back[0, :, :3], want)
    assert not back[..., 3].any()


def test_bad_input():
    gap = jnp.zeros((1, 3, 3))
    with pytest.raises(ValueError, match=r"density_peaks: k=4 must lie in \[1, 3\]"):
        select.density_peaks(gap, 4)
    with pytest.raises(ValueError, match=r"neighbours=0 must lie in \[1"):
        select.density_peaks(gap, 2, neighbours=0)
    with pytest.raises(ValueError, match=r"cluster_medoids: k=12 must lie in"):
        select.cluster_medoids(X, 12)
    with pytest.raises(ValueError, match="iterations=0 must be at least 1"):
        select.cluster_softly(X, X[:, :2], iterations=0)
    with pytest.raises(ValueError, match="norm='max' must be one of"):
        select.spread_back(X, X[:, :2], norm="max")
