"""Many tokens to one, by a learned query."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred.nn.attention import Attention
from tokred.nn.mlp import GELUS, Mlp
from tokred.tokens import Tokens


class AttentionPool(nnx.Module):
    """The head of big_vision and SigLIP: one query attends to all tokens, then u + Mlp(norm u)."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        gelu: str = "exact",
        norm_eps: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        draw = nnx.initializers.normal(0.02)
        self.query = nnx.Param(draw(rngs.params(), (1, width), param_dtype))
        self.attn = Attention(width, heads, **kinds)
        self.norm = nnx.LayerNorm(width, epsilon=norm_eps, **kinds)
        self.mlp = Mlp(width, hidden, activation=GELUS[gelu], **kinds)

    def __call__(self, tokens: Tokens) -> Float[Array, "*B D"]:
        """Validity and biases of keys act. Gradient: to the tokens and all parameters."""
        query = self.query[...].astype(tokens.x.dtype)
        q = self.attn.ask(jnp.broadcast_to(query, (*tokens.batch, *query.shape)))
        y = self.attn.attend(q, *self.attn.offer(tokens.x), tokens.replace(policy=None))
        return (y + self.mlp(self.norm(y)))[..., 0, :]


def attention_pool_macs(width: int, hidden: int, tokens: Any) -> Any:
    """Multiply-accumulates for one example of so many tokens."""
    return 2 * tokens * width**2 + 2 * tokens * width + 2 * width**2 + 2 * width * hidden
