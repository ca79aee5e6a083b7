"""Small modules that learned reductions bring into a model."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokred.boundary import boundary_chance
from tokred.nn.mlp import GatedMlp, activate
from tokred.nn.norm import RMSNorm


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
        y = activate(self.embed(self.norm(x)), "gelu")
        local, shared = jnp.split(y, 2, axis=-1)
        weight = kept[..., None].astype(y.dtype)
        mass = jnp.maximum(weight.sum(-2, keepdims=True), 1e-6)
        mean = (shared * weight).sum(-2, keepdims=True) / mass
        y = jnp.concatenate([local, jnp.broadcast_to(mean, shared.shape)], axis=-1)
        y = self.fc3(activate(self.fc2(activate(self.fc1(y), "gelu")), "gelu"))
        return jax.nn.log_softmax(y.astype(jnp.float32), axis=-1)


class RateLogits(nnx.Module):
    """DiffRate's parameters of one block: logits over candidate counts, for pruning and merging.

    Source: Chen et al. 2023, OpenGVLab/DiffRate.
    """

    def __init__(self, candidates: int):
        self.prune = nnx.Param(jnp.zeros((candidates,), jnp.float32))
        self.merge = nnx.Param(jnp.zeros((candidates,), jnp.float32))


class TokenRouter(nnx.Module):
    """Mixture-of-Depths: a score per token in float32, and perhaps a predictor of being chosen.

    Source: Raposo et al. 2024; the predictor's shape is our choice.
    """

    def __init__(self, width: int, *, predictor: bool = False, rngs: nnx.Rngs):
        start = nnx.initializers.normal(width**-0.5)  # zeros would tie the first choice
        self.score = nnx.Linear(width, 1, use_bias=False, kernel_init=start, rngs=rngs)
        self.fc1 = nnx.Linear(width, width // 2, rngs=rngs) if predictor else None
        self.fc2 = nnx.Linear(width // 2, 1, rngs=rngs) if predictor else None

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N"]:
        """Scores. Gradient: to x and the weights."""
        return self.score(x.astype(jnp.float32))[..., 0]

    def predict(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N"]:
        """Logits of being chosen. Gradient: to the predictor alone."""
        if self.fc1 is None or self.fc2 is None:
            raise ValueError("TokenRouter: built without a predictor; pass predictor=True.")
        y = jax.lax.stop_gradient(x).astype(jnp.float32)
        return self.fc2(jax.nn.silu(self.fc1(y)))[..., 0]


class VisionRouter(nnx.Module):
    """p-MoD: a logit per token in float32, 0 for all at the start.

    Source: Zhang et al. 2024, MCG-NJU/p-MoD.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.score = nnx.Linear(width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N"]:
        return self.score(x.astype(jnp.float32))[..., 0]


class PairRouter(nnx.Module):
    """gamma-MoD: two logits per token in float32, (skip, enter).

    Source: Luo et al. 2024, Yaxin9Luo/Gamma-MOD.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.score = nnx.Linear(width, 2, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N 2"]:
        return self.score(x.astype(jnp.float32))


class DuoMlp(nnx.Module):
    """Duo-LLM: a small gated MLP beside a layer's own, and logits over (bypass, small, big)."""

    def __init__(self, width: int, hidden: int, *, activation: str = "silu", rngs: nnx.Rngs):
        self.small = GatedMlp(width, hidden, activation=activation, rngs=rngs)
        self.router = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N 3"]:
        """The router's logits in float32."""
        return self.router(x.astype(jnp.float32))


class DeleteGate(nnx.Module):
    """MrT5: a logit per token in float32, above 0 to keep; at first around 1.

    Source: Kallini et al. 2024, jkallini/mrt5 `SigmoidDeleteGate`.
    """

    def __init__(self, width: int, *, norm_eps: float = 1e-6, rngs: nnx.Rngs):
        self.norm = RMSNorm(width, epsilon=norm_eps)
        start, ones = nnx.initializers.xavier_uniform(), nnx.initializers.ones
        self.score = nnx.Linear(width, 1, kernel_init=start, bias_init=ones, rngs=rngs)

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N"]:
        return self.score(self.norm(x.astype(jnp.float32)))[..., 0]


class BoundaryRouter(nnx.Module):
    """H-Net: chances of a boundary in float32, and a projection of the stream around the segments.

    At first queries and keys are the tokens themselves, and the projection gives 0.
    Source: goombalab/hnet `RoutingModule`, `residual_proj`.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        identity = lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype)  # noqa: E731
        same = {"use_bias": False, "kernel_init": identity, "rngs": rngs}
        self.query = nnx.Linear(width, width, **same)
        self.key = nnx.Linear(width, width, **same)
        zeros = nnx.initializers.zeros
        self.residual = nnx.Linear(width, width, kernel_init=zeros, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "*B N D"],
        previous: Int[Array, "*B N"],
        first: Bool[Array, "*B N"],
    ) -> Float[Array, "*B N"]:
        """See `boundary.boundary_chance`. Gradient: to x, query and key."""
        x = x.astype(jnp.float32)
        return boundary_chance(self.query(x), self.key(x), previous, first)

    def pass_by(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N D"]:
        """What is added to the tokens again, in float32."""
        return self.residual(x.astype(jnp.float32))


class HaltingHead(nnx.Module):
    """KARL: a logit of halting per token in float32: norm, D -> hidden, tanh, 1.

    Source: ShivamDuggal4/karl `encoder_ln_post_halt`, `halting_mlp`.
    """

    def __init__(self, width: int, hidden: int = 512, *, norm_eps: float = 1e-5, rngs: nnx.Rngs):
        start = {"kernel_init": nnx.initializers.truncated_normal(0.02), "rngs": rngs}
        self.norm = nnx.LayerNorm(width, epsilon=norm_eps, rngs=rngs)
        self.fc1 = nnx.Linear(width, hidden, **start)
        self.fc2 = nnx.Linear(hidden, 1, **start)

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N"]:
        return self.fc2(jnp.tanh(self.fc1(self.norm(x.astype(jnp.float32)))))[..., 0]


class ErrorEmbedding(nnx.Module):
    """KARL: an embedding of each level of error, at first the level in every entry.

    Source: ShivamDuggal4/karl `rec_loss_embeddings`.
    """

    def __init__(self, levels: Float[Array, " L"], width: int):
        table = jnp.broadcast_to(levels[:, None], (len(levels), width))
        self.table = nnx.Param(table.astype(jnp.float32))

    def __call__(self, level: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return self.table[...][level]
