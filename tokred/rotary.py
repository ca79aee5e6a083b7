"""Rotary positions (Su et al. 2021) from the positions that tokens carry."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from tokred.ops.gather import aligned
from tokred.positions import check_positions


@dataclass(frozen=True)
class RopeScaling:
    """Slower turns for contexts longer than the one trained on; all fields are static.

    Every pair of channels turns `factor` times slower (Chen et al. 2023, 'linear'). With
    `original`, the context trained on, those that turn more than `high` times within it keep their
    rate, and those between `low` and `high` turns lie in between (Llama 3.1, 'llama3').
    """

    factor: float
    original: int | None = None
    low: float = 1.0
    high: float = 4.0

    def __call__(self, rates: Float[Array, " half"]) -> Float[Array, " half"]:
        """The slower rates."""
        if self.original is None:
            return rates / self.factor
        turns = self.original * rates / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return rates * (kept + (1 - kept) / self.factor)


def rotary_rates(
    width: int, theta: float, scaling: RopeScaling | None = None
) -> Float[Array, " half"]:
    """Radians per position of each pair of channels: theta^(-2i / width), perhaps scaled; rounded
    as torch does, since positions multiply the last bit."""
    power = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    rates = 1 / (float(theta) ** power.astype(np.float64)).astype(np.float32)
    return jnp.asarray(rates) if scaling is None else scaling(jnp.asarray(rates))


def rotate(
    x: Float[Array, "*B N H E"], position: Num[Array, "*B N"], theta: float
) -> Float[Array, "*B N H E"]:
    """Channels i and i + E/2 turned by position / theta^(2i/E), in float32 (Llama's halves).

    Static: theta. Gradient: to x. Raises TypeError for positions in bfloat16 or float16.
    """
    return rotate_by(x, position[..., None], rotary_rates(x.shape[-1], theta))


def rotate_by(
    x: Float[Array, "*B E"], position: Num[Array, "*#B"], rates: Float[Array, " half"]
) -> Float[Array, "*B E"]:
    """The same for any layout: one position for every vector, and the rates themselves.

    Turning a key again by its new position less its old one moves it there.
    """
    check_positions(position=position)
    angle = position[..., None].astype(jnp.float32) * aligned(rates, x.ndim, x.ndim - 1)
    return turn(x, jnp.cos(angle), jnp.sin(angle))


def turn(
    x: Float[Array, "*B E"], cos: Float[Array, "*#B half"], sin: Float[Array, "*#B half"]
) -> Float[Array, "*B E"]:
    """Channels i and i + E/2 as the plane that cos and sin turn; means of both shrink it too."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
