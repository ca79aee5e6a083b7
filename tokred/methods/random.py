"""Random pruning: the baseline that every learned score has to beat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from tokred.maps import Keep
from tokred.methods import routing
from tokred.methods.registry import register
from tokred.methods.topk import stage_counts
from tokred.plan import Layout, Plan, Reduction, Site
from tokred.score import score_by_chance
from tokred.select import keep_top_k
from tokred.tokens import Tokens


@dataclass(frozen=True)
class Random(Reduction):
    """Keeps `k` tokens by uniform draws."""

    k: int

    def counts(self, n: int, prefix: int) -> int:
        return prefix + self.k

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Keep:
        if key is None:
            raise ValueError("method 'random': draws need a key; pass call=Call(key=...).")
        scores = score_by_chance(key, (*tokens.batch, tokens.n))
        return keep_top_k(scores, self.k, prefix=tokens.prefix, valid=tokens.valid)


@register("random", family="baseline", site="mid", needs=("key",))
def random(
    layout: Layout,
    *,
    keep: float = 0.7,
    layers: Sequence[int] | None = None,
    site: str = "mid",
) -> Plan:
    """Tokens drawn at random, in the stages of top-k.

    site: 'output' for once behind the last layer.
    """
    if site == "output":
        k = max(1, routing.share_of(layout.patches, keep))
        return Plan(((Site("output"), Random(k)),), name="random")
    if site != "mid":
        raise ValueError(f"random: site={site!r} must be 'mid' or 'output'; change site.")
    steps = [(Site("mid", i), Random(k)) for i, k in stage_counts(layout, keep, layers)]
    return Plan(tuple(steps), name="random")
