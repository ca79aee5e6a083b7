"""EViT: keep what the class token attends to, fuse the rest into one token (Liang et al. 2022).

Official code: youweiliang/evit (Apache-2.0).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from tokred.maps import Assign, Keep, TokenMap
from tokred.methods.registry import register
from tokred.methods.topk import CLASS_ROW
from tokred.plan import Ask, Layout, Plan, Reduction, Site
from tokred.schedule import stage_layers
from tokred.select import merge_into, rank_tokens
from tokred.tokens import Tokens, move


@dataclass(frozen=True)
class EViT(Reduction):
    """ceil(keep n) tokens by class attention, or `tokens` of them; the others become one token,
    the sum of their features weighted by class attention, which is not normalised.

    Order: prefix, kept by descending score, fused. With nothing to drop there is no fused token.
    """

    keep: float = 0.7
    fuse: bool = True
    tokens: int | None = None
    asks: ClassVar[tuple[Ask, ...]] = (CLASS_ROW,)

    def kept(self, n: int, prefix: int) -> int:
        return math.ceil(self.keep * (n - prefix)) if self.tokens is None else self.tokens

    def idle(self, n: int, prefix: int) -> bool:
        return self.kept(n, prefix) == n - prefix

    def counts(self, n: int, prefix: int) -> int:
        return n if self.idle(n, prefix) else prefix + self.kept(n, prefix) + int(self.fuse)

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Assign:
        scores = evidence[CLASS_ROW.name]
        ranked = rank_tokens(scores, prefix=tokens.prefix, valid=tokens.valid)
        k = self.counts(tokens.n, tokens.prefix)
        rank = Keep(ranked.index, tokens.n).source
        fused = tokens.prefix + self.kept(tokens.n, tokens.prefix)
        target, (stand, join) = jnp.minimum(rank, fused), jnp.split(ranked.index, [k], axis=-1)
        return merge_into(target, k, stand, tokens.valid, join)

    def move(self, tokens: Tokens, map_: TokenMap, evidence: Mapping[str, Array]) -> Tokens:
        stays = map_.source < tokens.prefix + self.kept(tokens.n, tokens.prefix)
        weight = jnp.where(stays, 1.0, evidence[CLASS_ROW.name])
        return move(tokens, map_, how="weighted_sum", weight=weight)


@register(
    "evit",
    family="prune",
    site="mid",
    needs=("class token",),
    golden=("vit/evit_block", "vit/evit_keep_rate"),
    paper="EViT 2022",
)
def evit(
    layout: Layout, *, keep: float = 0.7, layers: Sequence[int] | None = None, fuse: bool = True
) -> Plan:
    """Class attention keeps tokens and fuses the others into one, in stages."""
    layers = stage_layers(layout.depth) if layers is None else layers
    plain, steps, n = EViT(keep, fuse), [], layout.patches
    for i in layers:
        left = plain.counts(n, 0)
        more = layout.rounded(left) - left
        exact = replace(plain, tokens=plain.kept(n, 0) + more) if more else plain
        steps.append((Site("mid", i), exact))
        n = left + more
    return Plan(tuple(steps), name="evit")
