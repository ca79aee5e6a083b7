"""Constant matrices and tables of grids, as torch defines them: computed once, in float64."""

import functools
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokred.nn.embeddings import sincos_positions


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - distance, 0)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


KERNELS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "bicubic": _cubic,
    "bilinear": _linear,
}


def _constant(matrix: np.ndarray) -> np.ndarray:
    matrix = matrix.astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def _check_sizes(what: str, n: int, k: int) -> None:
    if n < 1 or k < 1:
        raise ValueError(f"{what}: n={n} and k={k} must both be at least 1; change them.")


@functools.cache
def adaptive_pool_matrix(n: int, k: int) -> Float[np.ndarray, "{k} {n}"]:
    """y = matrix x is adaptive average pooling from n to k points: point i is the mean of
    floor(i n / k) to ceil((i + 1) n / k). Read-only.

    Raises:
      ValueError: a size below 1.
    """
    _check_sizes("adaptive_pool_matrix", n, k)
    i, place = np.arange(k)[:, None], np.arange(n)[None]
    inside = (place >= i * n // k) & (place < -(-(i + 1) * n // k))
    return _constant(inside / inside.sum(1, keepdims=True))


@functools.cache
def resize_matrix(
    n: int, k: int, kind: str = "bicubic", align_corners: bool = False, antialias: bool = False
) -> Float[np.ndarray, "{k} {n}"]:
    """y = matrix x interpolates n points at k: torch's `interpolate`.

    kind: 'bicubic' (a = -0.75) | 'bilinear'; of one axis, see `grid_matrix`. align_corners: the
    first and the last point stay where they are, else the edges of the first and the last cell.
    Beyond the edge lies the last point again. antialias: as Pillow resizes, bicubic with a = -0.5,
    where nothing lies beyond the edge. Read-only.

    Raises:
      ValueError: an unknown kind, a size below 1, or antialias with align_corners.
    """
    _check_sizes("resize_matrix", n, k)
    if kind not in KERNELS:
        raise ValueError(f"resize_matrix: kind={kind!r} must be one of {tuple(KERNELS)}.")
    if antialias:
        return _antialiased(n, k, kind, align_corners)
    i = np.arange(k)
    place = i * (n - 1) / max(k - 1, 1) if align_corners else (i + 0.5) * n / k - 0.5
    taps = np.floor(place)[:, None] + np.arange(-1, 3)
    weights = KERNELS[kind](np.abs(place[:, None] - taps))
    matrix = np.zeros((k, n))
    np.add.at(matrix, (i[:, None], np.clip(taps, 0, n - 1).astype(int)), weights)
    return _constant(matrix)


def _antialiased(n: int, k: int, kind: str, align_corners: bool) -> np.ndarray:
    if align_corners:
        raise ValueError("resize_matrix: antialias=True takes no align_corners; drop one of them.")
    kernel = KERNELS[kind] if kind == "bilinear" else functools.partial(_cubic, a=-0.5)
    middle, stretch = (np.arange(k)[:, None] + 0.5) * n / k, max(n / k, 1.0)
    weights = kernel(np.abs(np.arange(n)[None] + 0.5 - middle) / stretch)
    return _constant(weights / weights.sum(1, keepdims=True))


def grid_matrix(
    rows: Float[np.ndarray, "A H"], columns: Float[np.ndarray, "B W"]
) -> Float[np.ndarray, "A*B H*W"]:
    """The matrix of a raster-ordered grid: `rows` acts along its rows' axis (y), `columns` along
    the other (x)."""
    return np.kron(rows, columns)


def sincos_2d(width: int, grid: tuple[int, int]) -> Float[Array, "N {width}"]:
    """Fixed 2-D positions as in MAE: sin x, cos x, sin y, cos y, the column in the first half.

    Raises:
      ValueError: width is not a multiple of 4.
    """
    return jnp.roll(sincos_positions(grid, width), width // 2, axis=-1)
