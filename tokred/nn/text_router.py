"""How much a text has to do with each token of an image, as a small module scores it."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tokred.nn.chain import Chain, chain_macs
from tokred.nn.cross_attention import CrossAttention

HEAD = "norm linear relu linear"


class TextRouter(nnx.Module):
    """SliME's other router: each token looks at the text, and a bottleneck of width / 4 makes one
    logit of what it found, in float32.

    heads: default width / 128. text: width of the text's embeddings, default the tokens'.
    Source: yfzhang114/SliME `TextGuidedRouterAttention`, without its parts that no call reaches.
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        *,
        text: int | None = None,
        eps: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        text, heads = text or width, heads or max(1, width // 128)
        self.norm = nnx.LayerNorm(width, epsilon=eps, rngs=rngs)
        self.norm_text = nnx.LayerNorm(text, epsilon=eps, rngs=rngs)
        self.look = CrossAttention(width, heads, keys=text, rngs=rngs)
        self.head = Chain(HEAD, width, 1, hidden=max(1, width // 4), eps=eps, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "*B N D"],
        text: Float[Array, "*B T C"],
        valid: Bool[Array, "*B T"] | None = None,
    ) -> Float[Array, "*B N"]:
        """valid: of the text. Gradient: to x, text and the weights."""
        words: Any = self.norm_text(text.astype(jnp.float32))
        found = self.look(self.norm(x.astype(jnp.float32)), words, valid=valid)
        return self.head(found)[..., 0]


def router_macs(width: int) -> int:
    """Multiply-accumulates of one token, without those that grow with the text."""
    return 2 * width**2 + chain_macs(HEAD, width, 1, max(1, width // 4))
