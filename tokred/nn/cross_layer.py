"""CLCA's learned parts: tokens of its own, and a head over the class token's states."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred.nn.mlp import activate

NORM_EPS = 1e-5


class OwnTokens(nnx.Module):
    """A few learned tokens, with what their place adds to them."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
        draw = jax.random.truncated_normal(rngs.params(), -2, 2, (count, width))
        self.table = nnx.Param(0.02 * draw)

    def __call__(self, batch: tuple[int, ...]) -> Float[Array, "*B M D"]:
        table = self.table[...]
        return jnp.broadcast_to(
            table.reshape((1,) * len(batch) + table.shape), (*batch, *table.shape)
        )


class StatesHead(nnx.Module):
    """Logits from the class token's states at several layers: batch norm; per channel `kernels`
    weighted sums over the states; batch norm, GELU, linear.

    It stands for the final norm and the head. train: batch norms take the batch's statistics and
    update their own. Source: Rios et al. 2025, arkel23/CLCA `ifa_head`.
    """

    def __init__(self, width: int, states: int, classes: int, *, kernels: int = 2, rngs: nnx.Rngs):
        bound = states**-0.5
        self.norm1 = nnx.BatchNorm(width, epsilon=NORM_EPS, rngs=rngs)
        shape = (width, kernels, states)
        self.mix = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.bias = nnx.Param(jnp.zeros((width, kernels)))
        self.norm2 = nnx.BatchNorm(width * kernels, epsilon=NORM_EPS, rngs=rngs)
        self.out = nnx.Linear(width * kernels, classes, rngs=rngs)

    def __call__(
        self, states: Float[Array, "*B R D"], *, train: bool = False
    ) -> Float[Array, "*B classes"]:
        """Gradient: to states and weights."""
        x = self.norm1(states.astype(jnp.float32), use_running_average=not train)
        bias = self.bias[...]
        y = jnp.einsum("...rd,dgr->...dg", x, self.mix[...])
        y = y + bias.reshape((1,) * (y.ndim - 2) + bias.shape)
        y = self.norm2(y.reshape(*y.shape[:-2], -1), use_running_average=not train)
        return self.out(activate(y, "gelu"))
