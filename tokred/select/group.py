"""Groups that are given: cells of a grid, targets."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from tokred.maps import Assign
from tokred.select.rows import static_rows


def grid_cells(grid: tuple[int, int], cells: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A grid cut into near-equal cells: (cell of every raster position, centre of every cell).

    Static. Raises ValueError where a side has fewer positions than cells.
    """
    (h, w), (a, b) = grid, cells
    if not (0 < a <= h and 0 < b <= w):
        raise ValueError(f"grid_cells: cells={cells} must lie within grid={grid}; use fewer cells.")
    rows, cols = np.arange(h) * a // h, np.arange(w) * b // w
    middle = lambda ids, count: np.array([np.flatnonzero(ids == i).mean() for i in range(count)])  # noqa: E731
    centre = np.floor(middle(rows, a))[:, None] * w + np.floor(middle(cols, b))[None]
    return (rows[:, None] * b + cols[None]).reshape(-1), centre.reshape(-1).astype(np.int32)


def pool_cells(
    grid: tuple[int, int], cells: tuple[int, int], batch: tuple[int, ...], *, prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> Assign:  # fmt: skip
    """Average pooling: every grid cell becomes one token, its centre the representative."""
    target, centre = grid_cells(grid, cells)
    front = np.arange(prefix)
    target = static_rows(np.concatenate([front, target + prefix]), batch)
    index = static_rows(np.concatenate([front, centre + prefix]), batch)
    return merge_into(target, prefix + cells[0] * cells[1], index, valid)


def merge_into(
    target: Array, k: int, index: Array, valid: Array | None, joining: Array | None = None
) -> Assign:
    """An Assign whose invalid members go to nobody; a group is valid if any member is."""
    if valid is None:
        return Assign(target, k, index=index, joining=joining)
    map_ = Assign(jnp.where(valid, target, k), k, index=index)
    return dataclasses.replace(map_, valid=map_.apply(valid, "max"))
