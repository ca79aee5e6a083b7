"""Multi-head self-attention in two halves: projections, and what follows them."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from tokred.ops import attention, weighted_values
from tokred.tokens import Tokens


class Attention(nnx.Module):
    """Query, key and value projections, attention, output projection.

    Raises:
      ValueError: `width` is not a multiple of `heads`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        implementation: str | None = None,
        dtype: Any = None,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"Attention: width={width} must be a multiple of heads={heads}.")
        self.heads = heads
        self.implementation = implementation

        def linear(bias: bool) -> nnx.Linear:
            return nnx.Linear(
                width, width, use_bias=bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.query = linear(qkv_bias)
        self.key = linear(qkv_bias)
        self.value = linear(qkv_bias)
        self.out = linear(True)

    def project(self, x: Float[Array, "*B N D"]) -> tuple[Array, Array, Array]:
        """q, k, v [*B N H E]: per-token arrays, which maps may move."""
        return self.ask(x), *self.offer(x)

    def ask(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N H E"]:
        """The queries alone."""
        return self._split(self.query(x))

    def offer(self, x: Float[Array, "*B N D"]) -> tuple[Array, Array]:
        """Keys and values."""
        return self._split(self.key(x)), self._split(self.value(x))

    def _split(self, y: Array) -> Float[Array, "*B N H E"]:
        return y.reshape(*y.shape[:-1], self.heads, -1)

    def attend(self, q: Array, k: Array, v: Array, keys: Tokens) -> Float[Array, "*B N D"]:
        """The update of the queries; `keys` brings bias, validity and policy of k and v."""
        y = attention(
            q,
            k,
            v,
            bias=keys.key_bias(),
            valid=keys.valid,
            policy=keys.policy,
            policy_eps=keys.policy_eps,
            implementation=self.implementation,
        )
        return self.out(y.reshape(*y.shape[:-2], -1))

    def attend_given(
        self, probs: Float[Array, "*B H N M"], v: Float[Array, "*B M H E"]
    ) -> Float[Array, "*B N D"]:
        """The same, with probabilities that are known."""
        y = weighted_values(probs, v)
        return self.out(y.reshape(*y.shape[:-2], -1))
