"""Rotary positions (Su et al. 2021) from the positions that tokens carry."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tokred.ops.gather import aligned
from tokred.positions import check_positions


def rotary_rates(width: int, theta: float) -> Float[Array, " half"]:
    """Radians per position of each pair of channels: theta^(-2i / width)."""
    half = width // 2
    return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


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
