"""Root-mean-square normalisation."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32. offset: added to the scale (Gemma: 1)."""

    def __init__(
        self,
        width: int,
        *,
        epsilon: float,
        offset: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.epsilon, self.offset, self.dtype = epsilon, offset, dtype
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset, param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        scale = scale.reshape((1,) * (y.ndim - 1) + (-1,))
        return (y * scale).astype(self.dtype or x.dtype)
