"""TokenFLEX's gated perceptron between a vision encoder and a language model."""

import jax
from flax import nnx
from jaxtyping import Array, Float


class GatedProjector(nnx.Module):
    """LayerNorm, then down(silu(gate x) * up x), with biases and no way around.

    Source: LiAutoAD/Ristretto-3B `TokenAdaptiveProjector`.
    """

    def __init__(self, width: int, hidden: int, out: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, epsilon=eps, rngs=rngs)
        self.gate = nnx.Linear(width, hidden, rngs=rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, out, rngs=rngs)

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N E"]:
        x = self.norm(x)
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def gated_macs(width: int, hidden: int, out: int) -> int:
    """Multiply-accumulates of one token."""
    return 2 * width * hidden + hidden * out
