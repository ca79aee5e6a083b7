"""Small modules that learned reductions bring into a model."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred.nn.mlp import gelu


class KeepPredictor(nnx.Module):
    """DynamicViT's predictor: log-probabilities (keep, drop) per token.

    Half of the channels of an embedding stay local, the other half is averaged over the tokens
    that are still kept and shared. Source: Rao et al. 2021, raoyongming/DynamicViT `PredictorLG`.
    """

    def __init__(self, width: int, *, norm_eps: float = 1e-5, rngs: nnx.Rngs):
        linear = lambda a, b: nnx.Linear(a, b, rngs=rngs)  # noqa: E731
        self.norm = nnx.LayerNorm(width, epsilon=norm_eps, rngs=rngs)
        self.embed = linear(width, width)
        self.fc1 = linear(width, width // 2)
        self.fc2 = linear(width // 2, width // 4)
        self.fc3 = linear(width // 4, 2)

    def __call__(
        self, x: Float[Array, "*B N D"], kept: Float[Array, "*B N"]
    ) -> Float[Array, "*B N 2"]:
        """`kept` weighs tokens in the shared half: 1 kept, 0 dropped before."""
        y = gelu(self.embed(self.norm(x)), "exact")
        local, shared = jnp.split(y, 2, axis=-1)
        weight = kept[..., None].astype(y.dtype)
        mass = jnp.maximum(weight.sum(-2, keepdims=True), 1e-6)
        mean = (shared * weight).sum(-2, keepdims=True) / mass
        y = jnp.concatenate([local, jnp.broadcast_to(mean, shared.shape)], axis=-1)
        y = self.fc3(gelu(self.fc2(gelu(self.fc1(y), "exact")), "exact"))
        return jax.nn.log_softmax(y.astype(jnp.float32), axis=-1)


class RateLogits(nnx.Module):
    """DiffRate's parameters of one block: logits over candidate counts, for pruning and merging.

    Source: Chen et al. 2023, OpenGVLab/DiffRate.
    """

    def __init__(self, candidates: int):
        self.prune = nnx.Param(jnp.zeros((candidates,), jnp.float32))
        self.merge = nnx.Param(jnp.zeros((candidates,), jnp.float32))
