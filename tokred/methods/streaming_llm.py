"""StreamingLLM (Xiao et al. 2023): attention sinks and a window of the latest entries.

Official code: mit-han-lab/streaming-llm (MIT).
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from tokred.cache import Eviction, Look, score_by_place
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Site


@dataclass(frozen=True)
class StreamingLLM(Eviction):
    """The first `sinks` entries and the latest ones. Official: positions='renumber', budget one
    less than sinks and window together, since that counts the token that is being read."""

    sinks: int = 4
    positions: str = "renumber"

    def score(self, cache: Any, look: Look) -> Array:
        return score_by_place(cache.position, sinks=self.sinks)


@register(
    "streaming_llm",
    family="evict",
    site="cache",
    paper="StreamingLLM 2023",
    golden=("kv/streamingllm",),
)
def streaming_llm(
    layout: Layout,
    *,
    keep: float = 0.2,
    budget: int | None = None,
    sinks: int = 4,
    spare: int | None = 1,
    positions: str = "renumber",
) -> Plan:
    """The first and the latest cache entries stay, at positions without gaps.

    keep: share of a prompt's entries; budget: their number instead. spare, positions: see
    `Eviction`.
    """
    how = StreamingLLM(budget or keep, spare, sinks, positions=positions)
    return Plan(((Site("cache"), how),), name="streaming_llm")
