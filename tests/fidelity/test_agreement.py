"""Measures of agreement, by hand and against scipy's."""

import numpy as np
import pytest

from tokred.fidelity.agreement import (
    correlation,
    cosine,
    overlap,
    pair_cosines,
    rank_correlation,
)

A = np.random.default_rng(0).normal(size=(2, 3, 4))
FLAT = np.zeros((1, 2, 2))


def test_a_copy_agrees_wholly():
    assert correlation(A, A) == 1 and overlap(A, A, 0.5) == 1
    assert cosine(A, A) == pytest.approx(1)
    assert rank_correlation(A.ravel(), A.ravel()) == 1


def test_correlation_is_of_each_image():
    assert correlation(A, -A) == pytest.approx(-1)
    assert correlation(A, np.stack([A[0] * 3 + 1, -A[1]])) == pytest.approx(0)
    assert correlation(FLAT, FLAT) == 1 and correlation(FLAT, FLAT + 1) == 0


def test_overlap_counts_cells():
    a = np.asarray([[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    b = np.asarray([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert overlap(a, b, 0.5) == pytest.approx((1 / 3 + 1) / 2)  # the second: nothing in either


def test_ranks_share_ties():
    x, y = np.asarray([1.0, 2.0, 2.0, 3.0]), np.asarray([1.0, 9.0, 2.0, 2.0])
    stats = pytest.importorskip("scipy.stats")
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_correlation(x, x**3) == 1


def test_pairs_are_counted_once():
    rows = np.asarray([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    np.testing.assert_allclose(pair_cosines(rows), [0, 0.5**0.5, 0.5**0.5], atol=1e-12)
