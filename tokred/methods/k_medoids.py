"""k-medoids: clusters each of which one of its own tokens stands for (Marin et al. 2023, Token
Pooling, arXiv 2110.03860).

After the port JoakimHaurum/TokenReduction (MIT): before three layers, weighed by the attention that
tokens received in the layer before, from all queries. As there, weights pick the first medoids and
then multiply costs, so that much attention speaks against a token; and costs sum over all tokens,
not those of the cluster. An empty cluster, there the first token, keeps its medoid here. Without
weights the port starts from a drawn token and adds the one whose largest distance to a medoid is
largest; here the first token, and the farthest from its nearest medoid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from tokred.maps import Assign, TokenMap
from tokred.methods.registry import register
from tokred.methods.soft_pool import staged
from tokred.plan import Ask, Layout, Plan, Reduction
from tokred.select import cluster_medoids
from tokred.tokens import Tokens, move

RECEIVED = Ask("column_mean", layer=-1)


@dataclass(frozen=True)
class KMedoids(Reduction):
    """`k` clusters, which become their medoids as they are. weighted: by received attention."""

    k: int
    iterations: int = 3
    weighted: bool = True

    @property
    def asks(self) -> tuple[Ask, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (RECEIVED,) if self.weighted else ()

    def counts(self, n: int, prefix: int) -> int:
        return prefix + self.k

    def macs(self, n: int, layout: Layout) -> int:
        return (n - layout.prefix) ** 2 * layout.width

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Assign:
        weight = evidence[RECEIVED.name] if self.weighted else None
        how = {"iterations": self.iterations, "prefix": tokens.prefix, "valid": tokens.valid}
        return cluster_medoids(tokens.x, self.k, weight, **how)

    def move(self, tokens: Tokens, map_: TokenMap, evidence: Mapping[str, Array]) -> Tokens:
        return move(tokens, map_, how="keep")


@register(
    "k_medoids",
    family="cluster",
    site="before",
    golden=("vit/kmedoids",),
    paper="Token Pooling 2023",
)
def k_medoids(
    layout: Layout,
    *,
    keep: float = 0.7,
    layers: Sequence[int] | None = None,
    iterations: int = 3,
    weighted: bool = True,
) -> Plan:
    """Clusters of similar tokens become their medoids, in stages.

    keep: ratio per stage. layers: where, default at a quarter, half, three quarters of the depth;
    none before the first layer with weighted=True, by attention received in the layer before.
    """
    make = lambda k: KMedoids(k, iterations, weighted)  # noqa: E731
    return staged("k_medoids", layout, keep, layers, make)
