"""SnapKV (Li et al. 2024) and PyramidKV (Cai et al. 2024): what the end of a prompt looks at.

Official code: FasterDecoding/SnapKV; Zefan-Cai/KVCache-Factory, as ported by NVIDIA/kvpress
(Apache-2.0). The ports average the query heads of a key head, which saves memory under grouped
queries; the authors hold an own cache for every query head.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from tokred.cache import Eviction, Look, pyramid_budgets, score_by_window
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Site


@dataclass(frozen=True)
class SnapKV(Eviction):
    """Entries by the attention of a prompt's last `window` queries, smoothed over `kernel` (odd)
    neighbours; the window stays. Acts once: nothing leaves after the prompt."""

    spare: int | None = None
    recent: int | float = 32
    kernel: int = 5
    pool: str = "mean"

    @property
    def window(self) -> int:
        return int(self.recent)

    def score(self, cache: Any, look: Look) -> Array:
        last = look.last(self.window)
        protected = cache.position[:, 0] > look.newest[:, None] - self.window
        groups = cache.k.shape[1]
        how = {"kernel": self.kernel, "pool": self.pool}
        return score_by_window(last.probs(cache), groups, protected, **how)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """The same, with budgets that fall linearly with depth, from most of a prompt to 1 / beta of
    the mean."""

    beta: float = 20.0

    def kept(self, prompt: int, layer: int, depth: int) -> int:
        mean = super().kept(prompt, layer, depth)
        if mean >= prompt:
            return mean
        how = {"window": self.window, "beta": self.beta}
        return pyramid_budgets(prompt, mean / prompt, depth, **how)[layer]


@register(
    "snapkv",
    family="evict",
    site="cache",
    paper="SnapKV 2024",
    golden=("kv/snapkv", "kv/snapkv_original"),
)
def snapkv(
    layout: Layout,
    *,
    keep: float = 0.2,
    budget: int | None = None,
    window: int = 32,
    kernel: int = 5,
    pool: str = "mean",
) -> Plan:
    """Cache entries that a prompt's last queries look at stay, with their neighbours.

    keep: share of a prompt's entries; budget: their number instead. Other options: see `SnapKV`.
    """
    how = SnapKV(budget or keep, recent=window, kernel=kernel, pool=pool)
    return Plan(((Site("cache"), how),), name="snapkv")


@register(
    "pyramidkv",
    family="evict",
    site="cache",
    paper="PyramidKV 2024",
    golden=("kv/pyramidkv", "kv/pyramidkv_budget"),
)
def pyramidkv(
    layout: Layout,
    *,
    keep: float = 0.2,
    budget: int | None = None,
    window: int = 32,
    kernel: int = 5,
    beta: float = 20.0,
) -> Plan:
    """SnapKV with more cache entries in early layers than in late ones.

    keep: mean share of a prompt's entries; budget: their mean number instead. beta: the deepest
    layer keeps 1 / beta of the mean.
    """
    how = PyramidKV(budget or keep, recent=window, kernel=kernel, beta=beta)
    return Plan(((Site("cache"), how),), name="pyramidkv")
