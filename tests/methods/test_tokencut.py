"""TokenCut: the eigenvector against scipy's, the object, padding, ties, and what has no cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage

from tokred.methods.tokencut import KEYS, TokenCut, find_object, number_parts
from tokred.score import score_by_normalised_cut
from tokred.tokens import make_tokens

GRID = (5, 6)


def scene(seed: int = 0) -> jax.Array:
    """Features [1 30 8] of an object in 3 x 3 cells from row 1, column 2 on, and a background."""
    rng = np.random.default_rng(seed)
    kind = np.zeros(GRID, int)
    kind[1:4, 2:5] = 1
    centres = rng.standard_normal((2, 8))
    return jnp.asarray(
        (centres[kind] + 0.2 * rng.standard_normal((*GRID, 8))).reshape(1, -1, 8), jnp.float32
    )


def reference(features: np.ndarray, tau: float, eps: float) -> np.ndarray:
    """The generalised problem itself, in float64; weighted graph."""
    x = np.asarray(features, np.float64)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    edge = x @ x.T
    edge[edge < tau] = eps
    degree = np.diag(edge.sum(1))
    return scipy.linalg.eigh(degree - edge, degree)[1][:, 1]


def test_the_eigenvector_is_that_of_the_generalised_problem():
    features = scene()
    found = np.asarray(score_by_normalised_cut(features, weighted=True))[0]
    wanted = reference(np.asarray(features[0]), 0.2, 1e-5)
    np.testing.assert_allclose(found, wanted * np.sign(found @ wanted), atol=1e-4)
    assert np.abs(found).max() == np.max(found)  # the largest by magnitude is on its own side


@pytest.mark.parametrize("weighted", [False, True])
def test_the_object_is_found(weighted):
    cut = lambda x: find_object(score_by_normalised_cut(x, weighted=weighted), GRID)  # noqa: E731
    found = jax.jit(cut)(scene(3))
    wanted = np.zeros(GRID, bool)
    wanted[1:4, 2:5] = True
    np.testing.assert_array_equal(found.mask[0], wanted)
    np.testing.assert_array_equal(found.box[0], [1, 2, 4, 5])
    assert wanted.reshape(-1)[found.seed[0]]


def test_parts_are_numbered_as_by_scipy():
    """A spiral takes the most steps."""
    rng = np.random.default_rng(0)
    spiral = ["1111111", "0000001", "1111101", "1000101", "1011101", "1000001", "1111111"]
    sides = [rng.random((7, 7)) < share for share in (0.3, 0.5, 0.6)]
    sides += [np.array([[c == "1" for c in row] for row in spiral]), np.zeros((7, 7), bool)]
    got = jax.jit(number_parts)(jnp.asarray(np.stack(sides)))
    for labels, side in zip(got, sides, strict=True):
        wanted, _ = scipy.ndimage.label(side)  # type: ignore[misc]
        np.testing.assert_array_equal(labels, wanted)


def test_neither_prefix_nor_padding_changes_the_cut():
    features, run = scene(1), jax.jit(score_by_normalised_cut, static_argnames=("prefix",))
    alone = run(features)
    wild = jnp.full((1, 2, 8), jnp.nan)
    more = jnp.concatenate([wild, features, wild], axis=1)
    valid = jnp.broadcast_to(jnp.arange(34) < 32, (1, 34))
    score = run(more, prefix=2, valid=valid)
    np.testing.assert_allclose(score[:, 2:32], alone, atol=1e-5)
    np.testing.assert_array_equal(score[:, :2], 0)
    np.testing.assert_array_equal(score[:, 32:], 0)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_tokens_have_a_finite_score(count):
    valid = jnp.broadcast_to(jnp.arange(30) < count, (1, 30))
    assert np.isfinite(score_by_normalised_cut(scene(), valid=valid)).all()


def test_tokens_with_the_same_neighbours_stay_in_their_order():
    """Equal features in two groups: all of a group are tied."""
    x = jnp.tile(jnp.array([[1.0, 0.0], [0.0, 1.0]]), (4, 1))[None]  # groups 0 2 4 6 and 1 3 5 7
    x = jnp.concatenate([x, jnp.array([[[0.0, -1.0]]])], axis=1)
    tokens = make_tokens(jnp.concatenate([x[:, :1], x], axis=1), prefix=1)
    map_ = TokenCut(3).select(tokens, {KEYS.name: tokens.x[:, :, None]}, key=None)
    body = np.asarray(map_.index)[0, 1:].tolist()
    assert body == sorted(body)
    assert len({(i - 1) % 2 for i in body if i < 9}) == 1
