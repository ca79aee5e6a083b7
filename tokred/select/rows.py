"""What selections share: static indices as rows, and ranges of counts."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tokred.ops.gather import aligned


def check_range(what: str, name: str, value: int, low: int, high: int) -> None:
    """Raises ValueError outside [low, high]."""
    if not low <= value <= high:
        raise ValueError(
            f"{what}: {name}={value} must lie in [{low}, {high}], as tokens and prefix allow; "
            f"change {name}."
        )


def static_rows(index: Sequence[int] | np.ndarray, batch: tuple[int, ...]) -> Array:
    """The same indices for every example."""
    return jnp.broadcast_to(jnp.asarray(index, jnp.int32), (*batch, len(index)))


def leading_row(a: Array, ndim: int) -> Array:
    """[N] with leading unit axes: rank promotion stays explicit."""
    return aligned(a, ndim, ndim - 1)
