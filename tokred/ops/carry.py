"""A bias per key for kernels that take none: in channels of its own."""

import jax.numpy as jnp
from jaxtyping import Array, Float

LARGE = 6e4  # what float16 still holds: far beyond any logit


def carry_bias(
    q: Float[Array, "*B N H E"],
    k: Float[Array, "*B M G E"],
    bias: Float[Array, "*B M"],
    scale: float,
    multiple: int = 8,
) -> tuple[Float[Array, "*B N H F"], Float[Array, "*B M G F"]]:
    """[q, 1] and [k, bias / scale], whose products times `scale` are q k^T scale + bias.

    In half precision two channels hold the bias, what is left of it in the second: one alone
    doubles attention's error. F is the next multiple of `multiple`; a bias is bounded by 6e4 scale.
    Static: scale, multiple. Gradient: to all.
    """
    wanted = jnp.clip(bias.astype(jnp.float32) / scale, -LARGE, LARGE)
    high = wanted.astype(k.dtype)
    parts = [high] if k.dtype == jnp.float32 else [high, (wanted - high).astype(k.dtype)]
    channels = jnp.stack(parts, -1)[..., None, :]  # [*B M 1 parts]
    channels = jnp.broadcast_to(channels, (*k.shape[:-1], len(parts)))
    ones = jnp.ones((*q.shape[:-1], len(parts)), q.dtype)
    longer = lambda x: pad_to(x, multiple, -1)  # noqa: E731
    return longer(jnp.concatenate([q, ones], -1)), longer(jnp.concatenate([k, channels], -1))


def pad_to(x: Array, multiple: int, axis: int, value: float = 0.0) -> Array:
    """`x` with as much of `value` behind `axis` as fills whole multiples; static all."""
    more = [(0, 0)] * x.ndim
    more[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, more, constant_values=value)
