"""What a LookupViT block has besides a transformer block: a cross-attention that is used both ways,
and a thin perceptron."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tokred.nn.mlp import Mlp
from tokred.ops import attention_probs

NORM_EPS = 1e-6
EPS = 1e-6  # of what a lookup token receives in all


class LookupAttention(nnx.Module):
    """Few compressed tokens [*B M D] gather from many lookup tokens [*B N D] and, after they have
    been refined, give back by the same attention, transposed; then each lookup token passes a
    perceptron of `hidden` channels. No parameter depends on M or N.

    gives: False without the way back. renorm: what a lookup token receives is a mean; else its
    weights add up to M / N on average, as the softmax was over the lookup tokens. Linear layers
    have biases but for the keys', where it would cancel.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        gives: bool = True,
        renorm: bool = False,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(
                f"LookupAttention: heads={heads} must divide the width {width}; change heads."
            )
        self.heads, self.renorm = heads, renorm
        norm = lambda: nnx.LayerNorm(width, epsilon=NORM_EPS, rngs=rngs)  # noqa: E731
        linear = lambda bias=True: nnx.Linear(width, width, use_bias=bias, rngs=rngs)  # noqa: E731
        self.norm_query, self.norm_key = norm(), norm()
        self.query, self.key, self.value, self.out = linear(), linear(False), linear(), linear()
        self.gives = gives
        if gives:
            self.norm_back, self.norm_feed = norm(), norm()
            self.value_back, self.out_back = linear(), linear()
            self.mlp = Mlp(width, hidden, param_dtype=jnp.float32, rngs=rngs)

    def gather(
        self,
        compressed: Float[Array, "*B M D"],
        lookup: Float[Array, "*B N D"],
        valid: Bool[Array, "*B N"] | None = None,
    ) -> tuple[Float[Array, "*B M D"], Float[Array, "*B H M N"]]:
        """The compressed tokens after it, and what each took of each lookup token, in float32.

        valid: of the lookup tokens. Gradient: to both.
        """
        seen = self.norm_key(lookup)
        q, k = self._split(self.query(self.norm_query(compressed))), self._split(self.key(seen))
        weights = attention_probs(q, k, valid=valid)
        v = self._split(self.value(seen))
        y = jnp.einsum("...hmn,...nhe->...mhe", weights.astype(v.dtype), v)
        return compressed + self._joined(self.out, y).astype(compressed.dtype), weights

    def give(
        self,
        lookup: Float[Array, "*B N D"],
        compressed: Float[Array, "*B M D"],
        weights: Float[Array, "*B H M N"],
    ) -> Float[Array, "*B N D"]:
        """The lookup tokens after it. Gradient: to all three."""
        if self.renorm:
            weights = weights / (weights.sum(-2, keepdims=True) + EPS)
        v = self._split(self.value_back(self.norm_back(compressed)))
        y = jnp.einsum("...hmn,...mhe->...nhe", weights.astype(v.dtype), v)
        lookup = lookup + self._joined(self.out_back, y).astype(lookup.dtype)
        return lookup + self.mlp(self.norm_feed(lookup)).astype(lookup.dtype)

    def _split(self, y: Array) -> Float[Array, "*B N H E"]:
        return y.reshape(*y.shape[:-1], self.heads, -1)

    def _joined(self, out: nnx.Linear, y: Float[Array, "*B N H E"]) -> Array:
        return out(y.reshape(*y.shape[:-2], -1))


def lookup_macs(n: int, m: int, width: int, hidden: int, gives: bool = True) -> int:
    """Multiply-accumulates of a `LookupAttention` of m compressed tokens on n lookup tokens."""
    taken = 2 * (n + m) * width**2 + 2 * n * m * width
    given = (n + m) * width**2 + n * m * width + 2 * n * width * hidden
    return taken + given if gives else taken
