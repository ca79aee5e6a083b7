"""TOVA, token omission via attention (Oren et al. 2024): what the newest query looks at.

Official code: schwartz-lab-NLP/TOVA (Apache-2.0).
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from tokred.cache import Eviction, Look, score_by_last
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Site


@dataclass(frozen=True)
class TOVA(Eviction):
    """Entries by the attention of the last query, mean over all heads: the same ones in all heads.
    recent: 0 as released, where the newest entry itself may leave; NVIDIA/kvpress has 1."""

    def score(self, cache: Any, look: Look) -> Array:
        return score_by_last(look.last(1).probs(cache)[:, :, 0], cache.k.shape[1])


@register(
    "tova",
    family="evict",
    site="cache",
    paper="TOVA 2024",
    golden=("kv/tova", "kv/tova_original"),
)
def tova(
    layout: Layout,
    *,
    keep: float = 0.2,
    budget: int | None = None,
    recent: int = 0,
    spare: int | None = 1,
    positions: str = "keep",
) -> Plan:
    """Cache entries that the newest token looks at stay.

    keep: share of a prompt's entries; budget: their number instead. recent: how many of the latest
    stay in any case. spare, positions: see `Eviction`.
    """
    how = TOVA(budget or keep, spare, recent=recent, positions=positions)
    return Plan(((Site("cache"), how),), name="tova")
