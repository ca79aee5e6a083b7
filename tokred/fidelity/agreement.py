"""How much two answers agree; pure functions of arrays, the dense answer second."""

import numpy as np
from scipy.stats import rankdata


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, mean over the leading axis; 1 where two constants are equal, 0 where they are
    not."""
    return float(np.mean([_correlation(x.ravel(), y.ravel()) for x, y in zip(a, b, strict=True)]))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (v.astype(np.float64) for v in (x, y))
    if np.array_equal(x, y):
        return 1.0
    x, y = x - x.mean(), y - y.mean()
    length = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / length) if length else 0.0


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, equal values at the mean of their ranks."""
    return _correlation(rankdata(x), rankdata(y))


def overlap(a: np.ndarray, b: np.ndarray, threshold: float) -> float:
    """Intersection over union of what lies above the threshold, mean over the leading axis; 1 where
    nothing does in either."""
    axes = tuple(range(1, a.ndim))
    both = ((a > threshold) & (b > threshold)).sum(axes)
    either = ((a > threshold) | (b > threshold)).sum(axes)
    return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the last axis, mean over the others."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (a, b))
    return float((a * b).sum(-1).mean())


def pair_cosines(x: np.ndarray) -> np.ndarray:
    """Of every two rows [N D], each pair once."""
    x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return (x @ x.T)[np.triu_indices(len(x), 1)]
