"""What soft assignments learn: modules that say how much each output takes of each token, and
modules that make all tokens again.

A module of the first kind gives (values [*B N D], logits [*B K N]); see `select.soften`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tokred.nn.mlp import Mlp, activate
from tokred.score import unit_rows

Looks = tuple[Float[Array, "*B N D"], Float[Array, "*B K N"]]
Valid = Bool[Array, "*B N"] | None


class QueryPool(nnx.Module):
    """PatchMerger: learned queries [K D] on normalised tokens, which are the values too.

    scaled: logits over sqrt(D). Source: Renggli et al. 2022, as in lucidrains/vit-pytorch and
    JoakimHaurum/TokenReduction `PatchMerger`.
    """

    def __init__(
        self, width: int, k: int, *, scaled: bool = False, norm_eps: float = 1e-5, rngs: nnx.Rngs
    ):
        self.scale = width**-0.5 if scaled else 1.0
        self.norm = nnx.LayerNorm(width, epsilon=norm_eps, rngs=rngs)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (k, width)))

    def __call__(self, x: Float[Array, "*B N D"], valid: Valid = None) -> Looks:
        x = self.norm(x)
        return x, self.scale * _products(self.queries[...], x)


class SpherePool(nnx.Module):
    """Sinkhorn: cosine similarities to learned centres [K D] over eps; values of length 1.

    The centres' lengths pass no gradient. Source: JoakimHaurum/TokenReduction `Sinkhorn`.
    """

    def __init__(self, width: int, k: int, *, eps: float = 1.0, rngs: nnx.Rngs):
        self.eps = eps
        self.centres = nnx.Param(jax.random.normal(rngs.params(), (k, width)))

    def __call__(self, x: Float[Array, "*B N D"], valid: Valid = None) -> Looks:
        x, v = unit_rows(x), self.centres[...].astype(jnp.float32)
        length = jax.lax.stop_gradient(jnp.linalg.norm(v, axis=-1, keepdims=True))
        return x, _products(v / jnp.maximum(length, 1e-12), x) / self.eps


class ScorePool(nnx.Module):
    """SiT's TSM and TokenLearner 1.1: a perceptron D -> hidden -> K scores every token for every
    output; the values are the tokens as they are.

    scaled: a learned factor, at first 1. activation: between them. The last layer has no bias,
    which a softmax over tokens would cancel.
    Source: Zong et al. 2022, Sense-X/SiT `TokenSlimmingModule`; Ryoo et al. 2021,
    google-research/scenic `TokenLearnerModuleV11`.
    """

    def __init__(
        self,
        width: int,
        k: int,
        hidden: int,
        *,
        scaled: bool = False,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.norm = nnx.LayerNorm(width, epsilon=norm_eps, rngs=rngs)
        self.fc1 = nnx.Linear(width, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, k, use_bias=False, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((1, 1, 1))) if scaled else None

    def __call__(self, x: Float[Array, "*B N D"], valid: Valid = None) -> Looks:
        y = self.fc2(activate(self.fc1(self.norm(x)), self.activation)).astype(jnp.float32)
        y = y if self.scale is None else y * self.scale[...].reshape((1,) * y.ndim)
        return x, jnp.swapaxes(y, -1, -2)


class MapPool(nnx.Module):
    """TokenLearner 1.0: four 3 x 3 convolutions on the grid, without biases, give K maps; the
    values are the tokens as they are, or over their number with mean=True.

    An invalid token is 0 to its neighbours in every convolution, as are those outside the grid.
    Source: Ryoo et al. 2021, google-research/scenic `TokenLearnerModule`.
    """

    def __init__(
        self,
        width: int,
        k: int,
        grid: tuple[int, int],
        *,
        mean: bool = False,
        norm_eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        self.grid, self.mean = grid, mean
        self.norm = nnx.LayerNorm(width, epsilon=norm_eps, rngs=rngs)
        conv = lambda a: nnx.Conv(a, k, (3, 3), use_bias=False, rngs=rngs)  # noqa: E731
        self.convs = nnx.List(conv(width if i == 0 else k) for i in range(4))

    def __call__(self, x: Float[Array, "*B N D"], valid: Valid = None) -> Looks:
        real = jnp.ones(x.shape[:-1]) if valid is None else valid.astype(jnp.float32)
        on_grid = lambda a: a.reshape(*a.shape[:-2], *self.grid, a.shape[-1])  # noqa: E731
        y, here = on_grid(self.norm(x)), on_grid(real[..., None])
        for i, conv in enumerate(self.convs):
            y = conv((activate(y, "gelu_tanh") if i else y) * here)
        y = y.reshape(*x.shape[:-1], -1)
        count = jnp.maximum(real.sum(-1), 1)[..., None, None]
        return x / count if self.mean else x, jnp.swapaxes(y, -1, -2)


class ReverseSlimming(nnx.Module):
    """SiT's RTSM: a perceptron K -> 4 N -> N across tokens makes all N again, then x + MLP(x).

    Source: Zong et al. 2022, Sense-X/SiT `ReverseTSM`.
    """

    def __init__(self, width: int, k: int, n: int, *, norm_eps: float = 1e-5, rngs: nnx.Rngs):
        norm = lambda: nnx.LayerNorm(width, epsilon=norm_eps, rngs=rngs)  # noqa: E731
        self.norm1, self.norm2 = norm(), norm()
        kinds = {"param_dtype": jnp.float32, "rngs": rngs}
        self.mlp1 = Mlp(k, 4 * n, out=n, **kinds)
        self.mlp2 = Mlp(width, 4 * width, **kinds)

    def __call__(self, x: Float[Array, "*B K D"]) -> Float[Array, "*B N D"]:
        """Gradient: to x."""
        y = jnp.swapaxes(self.mlp1(jnp.swapaxes(self.norm1(x), -1, -2)), -1, -2)
        return y + self.mlp2(self.norm2(y))


class TokenFuser(nnx.Module):
    """TokenLearner's way back: K tokens, mixed among each other, are handed out to N original ones
    by weights in (0, 1) that those choose; nothing at the start.

    Source: Ryoo et al. 2021, google-research/scenic `TokenFuser`.
    """

    def __init__(
        self, width: int, k: int, hidden: int = 64, *, norm_eps: float = 1e-6, rngs: nnx.Rngs
    ):
        norm = lambda: nnx.LayerNorm(width, epsilon=norm_eps, rngs=rngs)  # noqa: E731
        self.norm1, self.norm2, self.norm_original = norm(), norm(), norm()
        self.mix = nnx.Linear(k, k, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.mlp = Mlp(
            width, hidden, out=k, activation="gelu_tanh", param_dtype=jnp.float32, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "*B K D"], original: Float[Array, "*B N D"]
    ) -> Float[Array, "*B N D"]:
        """What is added to the original tokens. Gradient: to both."""
        y = jnp.swapaxes(self.mix(jnp.swapaxes(self.norm1(x), -1, -2)), -1, -2)
        weights = jax.nn.sigmoid(self.mlp(self.norm_original(original)))
        return jnp.einsum("...nk,...kd->...nd", weights, self.norm2(y))


def _products(queries: Array, x: Array) -> Float[Array, "*B K N"]:
    return jnp.einsum("kd,...nd->...kn", queries, x, preferred_element_type=jnp.float32)
