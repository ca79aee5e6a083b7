"""Which tokens of an image belong to which query: windows, crops of a page, regions of interest."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped


def dividing_windows(grid: tuple[int, int]) -> tuple[int, ...]:
    """The sides of the square windows that divide the grid, ascending."""
    common = math.gcd(*grid)
    return tuple(side for side in range(1, common + 1) if common % side == 0)


def check_window(grid: tuple[int, int], window: int) -> None:
    """Raises ValueError where windows do not fill the grid, with the nearest that do."""
    fits = dividing_windows(grid)
    if window not in fits:
        near = min(fits, key=lambda n: (abs(n - window), n))
        raise ValueError(
            f"window={window} does not divide the grid {grid[0]}x{grid[1]}; the nearest that does "
            f"is {near}."
        )


def group_crops(crops: Shaped[Array, "*B R C Y X D"]) -> Shaped[Array, "*B K P D"]:
    """K = Y X groups of P = R C: the crops of a page, R rows of C, laid out as one map and cut into
    blocks of R x C, so that block (i, j) lies where cell (i, j) of the whole page's view does.
    Source: DocOwl2's DocCompressor."""
    *batch, r, c, y, x, d = crops.shape
    page = jnp.moveaxis(crops, -4, -3).reshape(*batch, r * y, c * x, d)  # [R Y C X D] joined
    blocks = page.reshape(*batch, y, r, x, c, d)
    return jnp.moveaxis(blocks, -4, -3).reshape(*batch, y * x, r * c, d)


@functools.cache
def region_matrix(
    grid: tuple[int, int], parts: tuple[int, int], bins: tuple[int, int], samples: int = 2
) -> Float[np.ndarray, "K P M"]:
    """K = parts regions of equal size, each in P = bins cells; a cell averages samples x samples
    points, bilinear between the grid's M tokens: RoIAlign with half-pixel centres. Static all.
    Source: LLaVA-UHD's spatially constrained resampler."""
    sides = zip(grid, parts, bins, strict=True)
    rows, columns = (_region_side(n, k, p, samples) for n, k, p in sides)  # [k p n]
    both = np.einsum("apn,bqm->abpqnm", rows, columns)
    return both.reshape(math.prod(parts), math.prod(bins), math.prod(grid))


def _region_side(n: int, parts: int, bins: int, samples: int) -> Float[np.ndarray, "k p n"]:
    edge = n / parts / bins / samples
    at = (np.arange(parts * bins * samples) + 0.5) * edge - 0.5
    low = np.clip(np.floor(at), 0, n - 1).astype(int)
    high, share = np.minimum(low + 1, n - 1), np.clip(at - low, 0.0, 1.0)
    weight = np.zeros((len(at), n))
    np.add.at(weight, (np.arange(len(at)), low), 1 - share)
    np.add.at(weight, (np.arange(len(at)), high), share)
    return weight.reshape(parts, bins, samples, n).mean(2)


def in_bins(x: Array, matrix: Float[np.ndarray, "K P M"]) -> Array:
    """[*B M D] -> [*B K P D], or validity [*B M] -> [*B K P]: true where any of the bin is."""
    weight = jnp.asarray(matrix, jnp.float32)
    if x.dtype == bool:
        return jnp.einsum("kpm,...m->...kp", weight, x.astype(jnp.float32)) > 0
    return jnp.einsum("kpm,...md->...kpd", weight, x.astype(jnp.float32)).astype(x.dtype)
