"""Token axes split and joined: windows, crops, frames."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Tree = TypeVar("Tree")


def fold(x: Tree, groups: int, *, axis: int = 1) -> Tree:
    """A token axis split into a leading axis of `groups` and the tokens of each: windows, crops,
    frames. `unfold` undoes it. Static: groups. Raises ValueError for a token count that is not a
    multiple of `groups`."""

    def one(a: Array) -> Array:
        n = a.shape[axis]
        if n % groups:
            raise ValueError(f"fold: {n} tokens do not divide into {groups} groups; pad them.")
        return a.reshape((*a.shape[:axis], groups, n // groups, *a.shape[axis + 1 :]))

    return jax.tree.map(one, x)


def unfold(x: Tree, *, axis: int = 1) -> Tree:
    """Axes `axis` and `axis + 1` (groups, tokens) joined into one token axis again."""
    return jax.tree.map(lambda a: a.reshape((*a.shape[:axis], -1, *a.shape[axis + 2 :])), x)


def window_order(grid: tuple[int, int], window: tuple[int, int]) -> Int[Array, " N"]:
    """The raster index of every token of an h x w grid, window after window: a Keep index that
    makes `fold` by windows right. Static arguments.

    Raises:
      ValueError: the grid is not a multiple of the window.
    """
    (h, w), (a, b) = grid, window
    if h % a or w % b:
        raise ValueError(f"window_order: window {window} does not divide grid {grid}; change one.")
    raster = jnp.arange(h * w, dtype=jnp.int32).reshape(h // a, a, w // b, b)
    return raster.transpose(0, 2, 1, 3).reshape(-1)
