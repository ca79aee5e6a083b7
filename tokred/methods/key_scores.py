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

    @property
    def ordered(self) -> bool:
        return self.by == "cur"

    def score(self, cache: Any, look: Look) -> Array:
        return SCORES[self.by](cache)


@dataclass(frozen=True)
class LagKV(Eviction):
    """Entries unlike the `lag` that follow."""

    spare: int | None = None
    sinks: int = 4
    lag: int = 128
    cross: bool = False

    @property
    def ordered(self) -> bool:
        return True

    def score(self, cache: Any, look: Look) -> Array:
        how = {"lag": self.lag, "sinks": self.sinks, "cross": self.cross}
        return score_by_lag(cache.k, cache.v, valid=cache.valid, **how)


def _keyed(by: str, budget: int | float, *how: Any) -> Plan:
    """how: spare, sinks, recent, positions."""
    return Plan(((Site("cache"), KeyScores(budget, *how, by=by)),), name=by)


@register(
    "knorm",
    family="evict",
    site="cache",
    paper="Knorm 2024",
    golden=("kv/keyonly_scores", "kv/key_rerotation"),
)
def knorm(
    layout: Layout, *, keep: float = 0.2, budget: int | None = None, sinks: int = 0,
    recent: int = 0, spare: int | None = None, positions: str = "keep",
) -> Plan:  # fmt: skip
    """Cache entries with short keys stay.

    keep: share of a prompt's entries; budget: their number instead. Other options: see `Eviction`.
    """
    return _keyed("knorm", budget or keep, spare, sinks, recent, positions)


@register(
    "keydiff", family="evict", site="cache", paper="KeyDiff 2025", golden=("kv/keyonly_scores",)
)
def keydiff(
    layout: Layout, *, keep: float = 0.2, budget: int | None = None, sinks: int = 0,
    recent: int = 0, spare: int | None = None, positions: str = "keep",
) -> Plan:  # fmt: skip
    """Cache entries whose keys differ from the average stay.

    keep: share of a prompt's entries; budget: their number instead. Other options: see `Eviction`.
    """
    return _keyed("keydiff", budget or keep, spare, sinks, recent, positions)


@register("cur", family="evict", site="cache", paper="CurDKV 2025", golden=("kv/keyonly_scores",))
def cur(
    layout: Layout, *, keep: float = 0.2, budget: int | None = None, sinks: int = 4,
    recent: int = 0, spare: int | None = None, positions: str = "keep",
) -> Plan:  # fmt: skip
    """Cache entries with much leverage, |k|^2 |v|^2 among their neighbours, stay.

    keep: share of a prompt's entries; budget: their number instead. Other options: see `Eviction`.
    """
    return _keyed("cur", budget or keep, spare, sinks, recent, positions)


@register("lagkv", family="evict", site="cache", paper="LagKV 2025", golden=("kv/keyonly_scores",))
def lagkv(
    layout: Layout, *, keep: float = 0.2, budget: int | None = None, sinks: int = 4,
    lag: int = 128, cross: bool = False, spare: int | None = None, positions: str = "keep",
) -> Plan:  # fmt: skip
    """Cache entries unlike those that follow them stay.

    keep: share of a prompt's entries; budget: their number instead. lag, cross: see `score_by_lag`;
    other options: see `Eviction`.
    """
    how = LagKV(budget or keep, spare, sinks, positions=positions, lag=lag, cross=cross)
    return Plan(((Site("cache"), how),), name="lagkv")
