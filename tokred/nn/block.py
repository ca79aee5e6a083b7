"""A pre-norm transformer block in the parts that sites lie between."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from tokred.nn.attention import Attention
from tokred.nn.mlp import GELUS, Mlp
from tokred.tokens import Tokens


class Residual(nnx.Module):
    """Base of blocks: how the update of a branch joins the residual stream."""

    def join(
        self, x: Float[Array, "*B N D"], update: Float[Array, "*B N D"], branch: int
    ) -> Float[Array, "*B N D"]:
        """branch: 0 attention, 1 MLP, 2 cross-attention; static."""
        return x + update

    def route(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N M"]:
        """The logits of a mixture of experts' router. Raises ValueError without one."""
        raise ValueError(
            "Ask('experts'): this model has no mixture of experts; set DecoderConfig.experts."
        )


class Block(Residual):
    """x + s1 Attention(norm1 x), then x + s2 Mlp(norm2 x); s are LayerScales or 1.

    hidden: of the MLP, None for mlp_ratio widths.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        gelu: str = "exact",
        norm_eps: float = 1e-6,
        implementation: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = nnx.LayerNorm(width, epsilon=norm_eps, **common)
        self.attn = Attention(
            width, heads, qkv_bias=qkv_bias, implementation=implementation, **common
        )
        self.norm2 = nnx.LayerNorm(width, epsilon=norm_eps, **common)
        hidden = int(width * mlp_ratio) if hidden is None else hidden
        self.mlp = Mlp(width, hidden, activation=GELUS[gelu], **common)
        scale = lambda: (  # noqa: E731
            None if layer_scale is None else nnx.Param(jnp.full((width,), layer_scale, param_dtype))
        )
        self.scale1, self.scale2 = scale(), scale()

    def project(self, tokens: Tokens) -> tuple[Array, Array, Array]:
        """q, k, v [*B N H E] of the normalised tokens."""
        return self.attn.project(self.norm1(tokens.x))

    def evidence(self, tokens: Tokens) -> dict[str, Any]:
        """How this block's attention differs from a plain softmax, as fields of `Seen`."""
        return {}

    def attend(
        self, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens
    ) -> Float[Array, "*B N D"]:
        """The attention branch's update of the queries' residual stream."""
        return _scaled(self.attn.attend(q, k, v, keys), self.scale1)

    def attend_given(
        self, probs: Float[Array, "*B H N M"], v: Float[Array, "*B M H E"]
    ) -> Float[Array, "*B N D"]:
        """The same, with probabilities that are known."""
        return _scaled(self.attn.attend_given(probs, v), self.scale1)

    def feed(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N D"]:
        """The MLP branch's update."""
        return _scaled(self.mlp(self.norm2(x)), self.scale2)


def _scaled(x: Array, scale: Any) -> Array:
    if scale is None:
        return x
    return x * scale[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def drop_path(
    update: Float[Array, "B *N D"], rate: float | Array, key: PRNGKeyArray | None
) -> Float[Array, "B *N D"]:
    """Stochastic depth: the update of a random `rate` of examples is 0, the others grow by
    1 / (1 - rate). No key: unchanged."""
    if key is None:
        return update
    keep = 1.0 - rate
    alive = jax.random.bernoulli(key, keep, (update.shape[0],))
    scale = (alive / keep).astype(update.dtype)
    return update * scale.reshape((-1,) + (1,) * (update.ndim - 1))
