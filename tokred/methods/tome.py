"""Token Merging (Bolya et al. 2023): bipartite matching of keys, in three variants.

Official code: facebookresearch/ToMe (CC-BY-NC 4.0).
"""

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array

from tokred.maps import Assign, TokenMap
from tokred.methods.registry import register
from tokred.plan import Ask, Layout, Plan, Reduction, Site
from tokred.schedule import linear, ramp
from tokred.score import score_by_chance
from tokred.select import match_bipartite, match_kth, match_random
from tokred.tokens import Tokens, move

KEYS = Ask("keys")


@dataclass(frozen=True)
class ToMe(Reduction):
    """Merges `r` tokens into their most similar ones, by the keys' mean over heads.

    Features take the size-weighted mean. proportional: later attention adds log(size).
    """

    r: int = 8
    proportional: bool = True
    asks: ClassVar[tuple[Ask, ...]] = (KEYS,)

    def counts(self, n: int, prefix: int) -> int:
        return n - min(self.r, (n - prefix) // 2)

    def macs(self, n: int, layout: Layout) -> int:
        return (n // 2) * (n - n // 2) * (layout.width // layout.heads)

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Assign:
        r = tokens.n - self.counts(tokens.n, tokens.prefix)
        return match_bipartite(evidence[KEYS.name], r, prefix=tokens.prefix, valid=tokens.valid)

    def move(self, tokens: Tokens, map_: TokenMap, evidence: Mapping[str, Array]) -> Tokens:
        moved = move(tokens, map_)
        return moved.replace(proportional=tokens.proportional or self.proportional)


@dataclass(frozen=True)
class ToMeRandom(ToMe):
    """The `r` sources are drawn; the rest are destinations."""

    def counts(self, n: int, prefix: int) -> int:
        return n - min(self.r, n - prefix - 1)

    def macs(self, n: int, layout: Layout) -> int:
        k = self.counts(n, layout.prefix)
        return (n - k) * k * (layout.width // layout.heads)

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Assign:
        if key is None:
            raise ValueError("method 'tome_random': draws need a key; pass call=Call(key=...).")
        draws = score_by_chance(key, (*tokens.batch, tokens.n))
        r = tokens.n - self.counts(tokens.n, tokens.prefix)
        return match_random(evidence[KEYS.name], r, draws, prefix=tokens.prefix, valid=tokens.valid)


@dataclass(frozen=True)
class ToMeKth(ToMe):
    """Of each `every` consecutive tokens the last one stays and takes others in."""

    every: int = 2

    def counts(self, n: int, prefix: int) -> int:
        return prefix + (n - prefix) // self.every

    def macs(self, n: int, layout: Layout) -> int:
        stay = (n - layout.prefix) // self.every
        return stay * (self.every - 1) * stay * (layout.width // layout.heads)

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Assign:
        return match_kth(evidence[KEYS.name], self.every, prefix=tokens.prefix, valid=tokens.valid)


def removals(layout: Layout, keep: float, r: Any) -> tuple[int, ...]:
    """Tokens to merge per layer: `r` by ToMe's rules, or equal steps down to keep * patches."""
    n, depth = layout.patches, layout.depth
    if r is None:
        left = (n, *linear(n, keep, range(depth)))
    else:
        left = itertools.accumulate(ramp(depth, r), operator.sub, initial=n)
    return tuple(a - b for a, b in itertools.pairwise(map(layout.rounded, left)))


def _merging(name: str, kind: type[ToMe], layout: Layout, keep: float, r: Any, prop: bool) -> Plan:
    steps = enumerate(removals(layout, keep, r))
    return Plan(tuple((Site("mid", i), kind(n, prop)) for i, n in steps if n), name=name)


ABOUT = {"family": "merge", "site": "mid", "paper": "ToMe 2023"}


@register(
    "tome",
    golden=("vit/tome_bsm", "vit/tome_attn", "vit/tome_vit", "vit/tome_parse_r"),
    **ABOUT,
)
def tome(
    layout: Layout,
    *,
    keep: float = 0.25,
    r: int | Sequence[int] | tuple[int, float] | None = None,
    proportional: bool = True,
) -> Plan:
    """Similar tokens merge, a few in every layer, by balanced bipartite matching.

    keep: what is left after the last layer. r: instead, as in the official code: an int, a list,
    or (r, inflection).
    """
    return _merging("tome", ToMe, layout, keep, r, proportional)


@register("tome_random", golden=("vit/tome_random",), needs=("key",), **ABOUT)
def tome_random(
    layout: Layout,
    *,
    keep: float = 0.25,
    r: int | Sequence[int] | tuple[int, float] | None = None,
    proportional: bool = True,
) -> Plan:
    """ToMe with randomly drawn sources."""
    return _merging("tome_random", ToMeRandom, layout, keep, r, proportional)


@register("tome_kth", golden=("vit/tome_kth",), **ABOUT)
def tome_kth(
    layout: Layout, *, keep: float = 0.5, every: int = 2, proportional: bool = True
) -> Plan:
    """All tokens but each k-th merge, once. keep: the share of layers that run before."""
    layer = int(keep * layout.depth)
    if layer >= layout.depth:
        return Plan(name="tome_kth")
    step = (Site("mid", layer), ToMeKth(0, proportional, every))
    return Plan((step,), name="tome_kth")
