"""From pixels to tokens."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float


class PatchEmbed(nnx.Module):
    """One token per patch, raster order. A `kernel` larger than the patch sees its surroundings
    (padding 'SAME'), which small models learn from faster."""

    def __init__(
        self,
        patch: tuple[int, int],
        channels: int,
        width: int,
        *,
        kernel: tuple[int, int] | None = None,
        bias: bool = True,
        dtype: Any = None,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.proj = nnx.Conv(
            channels,
            width,
            kernel or patch,
            strides=patch,
            padding="SAME" if kernel else "VALID",
            use_bias=bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "*B Y X C"]) -> Float[Array, "*B N D"]:
        y = self.proj(images)
        return y.reshape(*y.shape[:-3], -1, y.shape[-1])


def sincos_positions(
    grid: tuple[int, int], width: int, *, temperature: float = 10000.0
) -> Float[Array, "N D"]:
    """Fixed 2-D positions: sin y, cos y, sin x, cos x, a quarter of the channels each.

    Raises:
      ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sincos positions need a width that is a multiple of 4, got {width}.")
    quarter = width // 4
    rates = 1.0 / temperature ** (np.arange(quarter) / quarter)
    y, x = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    waves = [f(axis.reshape(-1, 1) * rates) for axis in (y, x) for f in (np.sin, np.cos)]
    return jnp.asarray(np.concatenate(waves, axis=-1), jnp.float32)


def grid_positions(grid: tuple[int, int]) -> np.ndarray:
    """(row, column) of every raster position, Float[N 2]."""
    y, x = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    return np.stack([y.reshape(-1), x.reshape(-1)], -1).astype(np.float32)
