"""Rotary positions (Su et al. 2021) from the positions that tokens carry."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tokred.positions import check_positions


def rotate(
    x: Float[Array, "*B N H E"], position: Num[Array, "*B N"], theta: float
) -> Float[Array, "*B N H E"]:
    """Channels i and i + E/2 turned by position / theta^(2i/E), in float32 (Llama's halves).

    Static: theta. Gradient: to x. Raises TypeError for positions in bfloat16 or float16.
    """
    check_positions(position=position)
    half = x.shape[-1] // 2
    rates = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position[..., None, None].astype(jnp.float32) * rates.reshape(
        (1,) * (x.ndim - 1) + (-1,)
    )
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
