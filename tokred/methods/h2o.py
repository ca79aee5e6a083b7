"""H2O, the heavy-hitter oracle (Zhang et al. 2023): entries by all the attention they received.

Official code: FMInference/H2O (no licence file). It sums over the batch, here each example counts
for itself; under grouped queries the mean of a group counts.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tokred.cache import Eviction, Look, group_heads
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Site


@dataclass(frozen=True)
class H2O(Eviction):
    """The entries with the greatest sum of attention since they came, and the `recent` ones."""

    def settle(self, cache: Any) -> Any:
        return super().settle(replace(cache, score=_so_far(cache)))

    def observe(self, cache: Any, look: Look) -> Any:
        more = group_heads(look.received(cache), cache.k.shape[1])
        return replace(cache, score=_so_far(cache) + more)

    def score(self, cache: Any, look: Look) -> Array:
        return cache.score


@dataclass(frozen=True)
class ObservedAttention(H2O):
    """The same sum as a mean over the queries that could see the entry, so that early entries have
    no advantage (NVIDIA/kvpress, Apache-2.0)."""

    @property
    def dated(self) -> bool:
        return True

    def score(self, cache: Any, look: Look) -> Array:
        viewers = look.newest[:, None, None] - cache.position + 1
        return cache.score / jnp.maximum(viewers, 1)


def _so_far(cache: Any) -> Array:
    return jnp.zeros(cache.position.shape) if cache.score is None else cache.score


@register(
    "h2o",
    family="evict",
    site="cache",
    paper="H2O 2023",
    golden=("kv/h2o_drop_trace", "kv/h2o_mask_trace"),
)
def h2o(
    layout: Layout,
    *,
    keep: float = 0.2,
    budget: int | None = None,
    recent: int | float = 0.5,
    spare: int | None = 1,
    positions: str = "keep",
) -> Plan:
    """Cache entries with the most attention so far stay, and the latest ones.

    keep: share of a prompt's entries; budget: their number instead. recent: how many of them are
    the latest, or which share. spare, positions: see `Eviction`.
    """
    how = H2O(budget or keep, spare, recent=recent, positions=positions)
    return Plan(((Site("cache"), how),), name="h2o")


@register(
    "observed_attention",
    family="evict",
    site="cache",
    paper="kvpress 2024",
    golden=("kv/observed_attention",),
)
def observed_attention(
    layout: Layout,
    *,
    keep: float = 0.2,
    budget: int | None = None,
    recent: int | float = 0,
    spare: int | None = 1,
    positions: str = "keep",
) -> Plan:
    """Cache entries with the most attention so far, as a mean over time, stay.

    Options as of `h2o`.
    """
    how = ObservedAttention(budget or keep, spare, recent=recent, positions=positions)
    return Plan(((Site("cache"), how),), name="observed_attention")
