"""Evictions that look at keys and values alone: Knorm, KeyDiff, CUR, LagKV.

Devoto et al. 2024; Park et al. 2025; Sengupta et al. 2025 (CurDKV); Liang et al. 2025. Facts:
NVIDIA/kvpress (Apache-2.0).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from tokred.cache import (
    Eviction,
    LayerCache,
    Look,
    score_by_key_difference,
    score_by_key_norm,
    score_by_lag,
    score_by_leverage,
)
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Site

SCORES: dict[str, Callable[[LayerCache], Array]] = {
    "knorm": lambda cache: score_by_key_norm(cache.k),
    "keydiff": lambda cache: score_by_key_difference(cache.k, valid=cache.valid),
    "cur": lambda cache: score_by_leverage(cache.k, cache.v, valid=cache.valid),
}


@dataclass(frozen=True)
class KeyScores(Eviction):
    """Entries by one of `SCORES`, which needs no query."""

    by: str = "knorm"

    def score(self, cache: Any, look: Look) -> Array:
        return SCORES[self.by](cache)


@dataclass(frozen=True)
class LagKV(Eviction):
    """Entries unlike the `lag` that follow. Acts once, on a cache in the order of the text."""

    spare: int | None = None
    sinks: int = 4
    lag: int = 128
    cross: bool = False

    def score(self, cache: Any, look: Look) -> Array:
        how = {"lag": self.lag, "sinks": self.sinks, "cross": self.cross}
        return score_by_lag(cache.k, cache.v, valid=cache.valid, **how)


def _keyed(by: str, keep: float, budget: int | None, sinks: int, recent: int, spare: Any) -> Plan:
    how = KeyScores(budget or keep, spare, sinks, recent, by=by)
    return Plan(((Site("cache"), how),), name=by)


@register("knorm", family="evict", site="cache", paper="Knorm 2024", golden=("kv/keyonly_scores",))
def knorm(
    layout: Layout, *, keep: float = 0.2, budget: int | None = None, sinks: int = 0,
    recent: int = 0, spare: int | None = None,
) -> Plan:  # fmt: skip
    """Cache entries with short keys stay.

    keep: share of a prompt's entries; budget: their number instead. sinks, recent, spare: see
    `Eviction`.
    """
    return _keyed("knorm", keep, budget, sinks, recent, spare)


@register(
    "keydiff", family="evict", site="cache", paper="KeyDiff 2025", golden=("kv/keyonly_scores",)
)
def keydiff(
    layout: Layout, *, keep: float = 0.2, budget: int | None = None, sinks: int = 0,
    recent: int = 0, spare: int | None = None,
) -> Plan:  # fmt: skip
    """Cache entries whose keys differ from the average stay.

    keep: share of a prompt's entries; budget: their number instead. sinks, recent, spare: see
    `Eviction`.
    """
    return _keyed("keydiff", keep, budget, sinks, recent, spare)


@register("cur", family="evict", site="cache", paper="CurDKV 2025", golden=("kv/keyonly_scores",))
def cur(
    layout: Layout, *, keep: float = 0.2, budget: int | None = None, sinks: int = 4,
    recent: int = 0,
) -> Plan:  # fmt: skip
    """Cache entries with much leverage, |k|^2 |v|^2 among their neighbours, stay; acts once.

    keep: share of a prompt's entries; budget: their number instead. sinks, recent: see `Eviction`.
    """
    return _keyed("cur", keep, budget, sinks, recent, None)


@register("lagkv", family="evict", site="cache", paper="LagKV 2025", golden=("kv/keyonly_scores",))
def lagkv(
    layout: Layout, *, keep: float = 0.2, budget: int | None = None, sinks: int = 4,
    lag: int = 128, cross: bool = False,
) -> Plan:  # fmt: skip
    """Cache entries unlike those that follow them stay.

    keep: share of a prompt's entries; budget: their number instead. Other options: see
    `score_by_lag`.
    """
    how = LagKV(budget or keep, sinks=sinks, lag=lag, cross=cross)
    return Plan(((Site("cache"), how),), name="lagkv")
