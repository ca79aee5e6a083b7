"""TokenLearner (Ryoo et al. 2021, arXiv 2106.11297): a few learned weighted sums of tokens, and
perhaps a way back to all of them.

Official code: google-research/scenic (Apache-2.0), whose GELU is the tanh approximation. Version
'1.0', the paper's: four 3 x 3 convolutions and a sigmoid per map; '1.1', the code's default: a
perceptron and a softmax over tokens. Officially class tokens are tokens like others; here those of
the prefix stay aside, and 1.0 takes any grid, not square ones alone. fuse: from the layer on every
layer has a TokenLearner of its own before it and a TokenFuser behind, whose result is added to all
tokens; else tokens are reduced once.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred.combine import Combine
from tokred.methods.connecting import Grid, require_grid
from tokred.methods.registry import register
from tokred.methods.routing import share_of
from tokred.methods.soft_pool import SoftPool
from tokred.nn.slimming import MapPool, ScorePool, TokenFuser
from tokred.plan import Layout, Plan, Reduction, Site
from tokred.tokens import Tokens

VERSIONS = ("1.0", "1.1")
NORM_EPS = 1e-6


@dataclass(frozen=True)
class TokenLearner(SoftPool):
    """Version 1.1: `k` softmax means by a perceptron of `hidden` channels."""

    method: ClassVar[str] = "tokenlearner"
    hidden: int = 64

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> ScorePool:
        how = {"activation": "gelu_tanh", "norm_eps": NORM_EPS}
        return ScorePool(width, self.k, self.hidden, **how, rngs=rngs)

    def module_macs(self, n: int, width: int) -> int:
        return n * (width + self.k) * self.hidden


@dataclass(frozen=True)
class MapLearner(SoftPool):
    """Version 1.0: `k` sums by maps in (0, 1) of the whole `grid`; mean: over the number of
    tokens."""

    method: ClassVar[str] = "tokenlearner"
    over: ClassVar[str] = "none"
    grid: Grid
    mean: bool = False

    def counts(self, n: int, prefix: int) -> int:
        require_grid(self.method, self.grid, n, prefix)
        return super().counts(n, prefix)

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> MapPool:
        return MapPool(width, self.k, self.grid, mean=self.mean, norm_eps=NORM_EPS, rngs=rngs)

    def module_macs(self, n: int, width: int) -> int:
        return 9 * n * (width + 3 * self.k) * self.k


class LearnerAndFuser(nnx.Module):
    """Both ways of one layer."""

    def __init__(self, learner: nnx.Module, fuser: TokenFuser):
        self.learner, self.fuser = learner, fuser


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["fuser", "before"], meta_fields=[]
)
@dataclass(frozen=True)
class FuseBack:
    """The prefix comes back as it is; what the fuser makes of the others is added to the tokens
    before."""

    fuser: Any
    before: Tokens

    def restore(self, y: Float[Array, "*B K D"]) -> Float[Array, "*B N D"]:
        """Gradient: to y and to all that is held."""
        prefix, valid = self.before.prefix, self.before.valid
        original = self.before.x[..., prefix:, :]
        added = self.fuser(y[..., prefix:, :], original)
        if valid is not None:
            added = jnp.where(valid[..., prefix:, None], added, 0)
        body = (original + added).astype(y.dtype)
        return jnp.concatenate([y[..., :prefix, :], body], axis=-2)


@dataclass(frozen=True)
class LearnAndFuse(Reduction):
    """Around a layer: it runs on what `learner` makes of the tokens, and all get something back.

    hidden: of the fuser's perceptron.
    """

    learner: SoftPool
    hidden: int = 64

    def counts(self, n: int, prefix: int) -> int:
        return self.learner.counts(n, prefix)

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> LearnerAndFuser:
        learner = self.learner.build(width, heads, rngs)
        fuser = TokenFuser(width, self.learner.k, self.hidden, norm_eps=NORM_EPS, rngs=rngs)
        return LearnerAndFuser(learner, fuser)

    def macs(self, n: int, layout: Layout) -> int:
        if self.idle(n, layout.prefix):
            return 0
        body, k, width = n - layout.prefix, self.learner.k, layout.width
        back = k * k * width + body * (width + k) * self.hidden + body * k * width
        return self.learner.macs(n, layout) + back

    def __call__(
        self,
        tokens: Tokens,
        evidence: Mapping[str, Array],
        state: Any = None,
        *,
        module: Any = None,
        key: Any = None,
        train: bool = False,
        twin: str = "packed",
    ) -> tuple[Tokens, Any, Any, dict[str, Any]]:
        learner, fuser = (None, None) if module is None else (module.learner, module.fuser)
        entered, map_, _, _ = self.learner(tokens, evidence, module=learner)
        if map_ is None:
            return tokens, None, state, {}
        return entered, map_, state, {"combine": Combine(restore=FuseBack(fuser, tokens))}


@register(
    "tokenlearner",
    family="resample",
    site="before",
    learned=True,
    trains="packed",
    paper="TokenLearner 2021",
)
def tokenlearner(
    layout: Layout,
    *,
    keep: float = 0.05,
    tokens: int | None = None,
    layer: int | None = None,
    version: str = "1.1",
    hidden: int = 64,
    mean: bool = False,
    fuse: bool = False,
) -> Plan:
    """Once, in the middle of the network, tokens become a few learned weighted sums of them.

    keep: ratio of those, or their number `tokens`. layer: before which, default the middle one.
    version: '1.0' (maps by convolutions; mean: over the number of tokens) | '1.1' (a perceptron of
    `hidden` channels). fuse: give back to all tokens behind every layer from there on.

    Raises:
      ValueError: an unknown version.
    """
    if version not in VERSIONS:
        raise ValueError(
            f"tokenlearner: version={version!r} must be one of {VERSIONS}; change version."
        )
    layer = layout.depth // 2 if layer is None else layer
    k = max(1, share_of(layout.patches, keep)) if tokens is None else tokens
    learner = TokenLearner(k, hidden) if version == "1.1" else MapLearner(k, layout.grid, mean)
    if not fuse:
        return Plan(((Site("before", layer), learner),), name="tokenlearner")
    layers = range(layer, layout.depth)
    steps = tuple((Site("around", i), LearnAndFuse(learner, hidden)) for i in layers)
    return Plan(steps, name="tokenlearner")
