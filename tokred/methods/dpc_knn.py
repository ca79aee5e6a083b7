"""DPC-KNN: density peaks become clusters, whose tokens are averaged (Du et al. 2016; the token
clusters of TCFormer, Zeng et al. 2022, arXiv 2204.08680).

After the port JoakimHaurum/TokenReduction (MIT), which puts it before three layers; class token and
registers stay aside. There a noise of 1e-6 keeps densities apart (`density_peaks` takes it as
draws); here, without draws, the earlier of two tokens counts as denser. Empty tokens, which there
join the first cluster with their weight, and whose distance depends on other images of the batch,
are no part of it here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred.maps import Assign
from tokred.methods.registry import register
from tokred.methods.soft_pool import staged
from tokred.plan import Layout, Plan, Reduction, require_module
from tokred.select import cluster_by_density
from tokred.tokens import Tokens, move

WEIGHTS = ("equal", "size", "score")


def shares(
    map_: Assign, weight: Float[Array, "*B N"], *, prefix: int = 0, eps: float = 1e-6
) -> Float[Array, "*B N"]:
    """Each token's weight over its group's and eps; 1 in the prefix. Gradient: to weight."""
    total = map_.restore(map_.apply(weight, "sum"))
    share = weight / jnp.maximum(total + eps, 1e-30)
    return share.at[..., :prefix].set(1.0)


@dataclass(frozen=True)
class DPCKNN(Reduction):
    """Means of `k` clusters around density peaks, best peak first.

    weight: of tokens in the mean: 'equal', 'size' (originals), or 'score': the exponential of a
    learned linear score. neighbours: of the density. eps: added to the sum of weights.
    Gradient: to the features and the score.
    """

    k: int
    neighbours: int = 5
    weight: str = "equal"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.weight not in WEIGHTS:
            raise ValueError(
                f"dpc_knn: weight={self.weight!r} must be one of {WEIGHTS}; change weight."
            )

    def counts(self, n: int, prefix: int) -> int:
        return prefix + self.k

    def macs(self, n: int, layout: Layout) -> int:
        scored = (n - layout.prefix) * layout.width * (self.weight == "score")
        return (n - layout.prefix) ** 2 * layout.width + scored

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> Any:
        return nnx.Linear(width, 1, rngs=rngs) if self.weight == "score" else None

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
    ) -> tuple[Tokens, Assign | None, Any, dict[str, Any]]:
        prefix = tokens.prefix
        if self.idle(tokens.n, prefix):
            return tokens, None, state, {}
        how = {"neighbours": self.neighbours, "prefix": prefix, "valid": tokens.valid}
        map_ = cluster_by_density(tokens.x, self.k, **how)
        weight = shares(map_, self._weights(tokens, module), prefix=prefix, eps=self.eps)
        return move(tokens, map_, how="weighted_sum", weight=weight), map_, state, {}

    def _weights(self, tokens: Tokens, module: Any) -> Float[Array, "*B N"]:
        if self.weight == "score":
            return jnp.exp(require_module(self, module)(tokens.x.astype(jnp.float32))[..., 0])
        return tokens.sizes() if self.weight == "size" else jnp.ones(tokens.x.shape[:-1])


@register(
    "dpc_knn",
    family="cluster",
    site="before",
    golden=("vit/dpcknn",),
    paper="TCFormer 2022",
)
def dpc_knn(
    layout: Layout,
    *,
    keep: float = 0.7,
    layers: Sequence[int] | None = None,
    neighbours: int = 5,
    weight: str = "equal",
) -> Plan:
    """Tokens join the nearest of the density peaks among them, in stages.

    keep: ratio per stage. layers: where, default at a quarter, half, three quarters of the depth.
    neighbours, weight: see `DPCKNN`; weight='score' is learned.
    """
    make = lambda k: DPCKNN(k, neighbours, weight)  # noqa: E731
    return staged("dpc_knn", layout, keep, layers, make)
