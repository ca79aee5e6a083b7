"""Top-K by class attention: the strong baseline of "Which Tokens to Use?" (Haurum et al. 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array

from tokred.maps import Keep
from tokred.methods.registry import register
from tokred.plan import Ask, Layout, Plan, Reduction, Site
from tokred.schedule import stage_layers, stages
from tokred.select import keep_top_k
from tokred.tokens import Tokens

CLASS_ROW = Ask("rows", rows="cls")


@dataclass(frozen=True)
class TopK(Reduction):
    """Keeps the `k` tokens that the class token attends to most, mean over heads."""

    k: int
    asks: ClassVar[tuple[Ask, ...]] = (CLASS_ROW,)

    def counts(self, n: int, prefix: int) -> int:
        return prefix + self.k

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Keep:
        scores = evidence[CLASS_ROW.name]
        return keep_top_k(scores, self.k, prefix=tokens.prefix, valid=tokens.valid)


def stage_counts(
    layout: Layout, keep: float, layers: Sequence[int] | None
) -> tuple[tuple[int, int], ...]:
    """(layer, patches kept) of a three-stage schedule: int(keep^(i+1) N0)."""
    layers = stage_layers(layout.depth) if layers is None else tuple(layers)
    kept = map(layout.rounded, stages(layout.patches, keep, layers))
    return tuple(zip(layers, kept, strict=True))


@register(
    "topk",
    family="prune",
    site="mid",
    needs=("class token",),
    golden=("vit/topk",),
    paper="Which Tokens to Use? 2023",
)
def topk(layout: Layout, *, keep: float = 0.7, layers: Sequence[int] | None = None) -> Plan:
    """The tokens with the most class attention, in stages.

    keep: ratio per stage. layers: where, default at a quarter, half, three quarters of the depth.
    """
    steps = [(Site("mid", i), TopK(k)) for i, k in stage_counts(layout, keep, layers)]
    return Plan(tuple(steps), name="topk")
