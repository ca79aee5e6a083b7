"""SnapKV (Li et al. 2024) and PyramidKV (Cai et al. 2024): what the end of a prompt looks at.

Official code: FasterDecoding/SnapKV; Zefan-Cai/KVCache-Factory, as ported by NVIDIA/kvpress
(Apache-2.0). The ports average the query heads of a key head, which saves memory under grouped
queries; the authors hold an own cache for every query head. Both act once, after the prompt; with
`spare` they go on as kvpress's decoding wrapper has it, looking from the last queries read.
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
    neighbours; the window stays. With `spare` the same happens while decoding."""

    spare: int | None = None
    recent: int | float = 32
    kernel: int = 5
    pool: str = "mean"

    @property
    def window(self) -> int:
        return int(self.recent)

    @property
    def recalled(self) -> int:
        return self.window

    @property
    def ordered(self) -> bool:
        return True

    def score(self, cache: Any, look: Look) -> Array:
        protected = cache.position > look.newest[:, None, None] - self.window
        probs = look.last(self.window).probs(cache)
        alone = probs.reshape(*protected.shape[:2], -1, *probs.shape[2:])  # [B G R W C]
        how = {"kernel": self.kernel, "pool": self.pool}
        return score_by_window(alone, 1, protected, **how)[:, :, 0]


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
    spare: int | None = None,
    positions: str = "keep",
) -> Plan:
    """Cache entries that a prompt's last queries look at stay, with their neighbours.

    keep: share of a prompt's entries; budget: their number instead. spare, positions: see
    `Eviction`; other options: see `SnapKV`.
    """
    how = SnapKV(
        budget or keep, spare, recent=window, positions=positions, kernel=kernel, pool=pool
    )
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
    spare: int | None = None,
    positions: str = "keep",
) -> Plan:
    """SnapKV with more cache entries in early layers than in late ones.

    keep: mean share of a prompt's entries; budget: their mean number instead. beta: the deepest
    layer keeps 1 / beta of the mean. spare, positions: see `Eviction`.
    """
    how = PyramidKV(
        budget or keep, spare, recent=window, positions=positions, kernel=kernel, beta=beta
    )
    return Plan(((Site("cache"), how),), name="pyramidkv")
