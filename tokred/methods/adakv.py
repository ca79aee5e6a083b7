"""AdaKV (Feng et al. 2024): the key heads of a layer share one budget.

Official code: FFY0/AdaKV, as ported by NVIDIA/kvpress (Apache-2.0), where heads that keep fewer
entries hide them and save nothing. Here the entries of a layer lie in one pool, whose slots belong
to one head each: bytes fall by the budget's share. A query's products with the slots of other heads
are computed and hidden, G times the arithmetic of decoding for G key heads.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from tokred.cache import LayerCache, Look, append_to_pool, keep_pooled, pool_heads
from tokred.methods.registry import register
from tokred.methods.snapkv import SnapKV
from tokred.plan import Layout, Plan, Site
from tokred.select import keep_where


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """The entries of all heads that SnapKV ranks highest, at least the share `floor` of the budget
    of each head. Acts once: nothing leaves after the prompt."""

    pooled: ClassVar[bool] = True
    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spare is not None or self.gapless:
            raise ValueError(
                f"adakv: spare={self.spare} and positions={self.positions!r} must be None and "
                "'keep', since it acts once on the heads of a pool; change them."
            )

    def settle(self, cache: LayerCache) -> LayerCache:
        none = jnp.zeros(cache.position.shape, jnp.int32)
        return cache if cache.owner is not None else replace(cache, owner=none)

    def begin(self, cache: LayerCache, look: Look) -> LayerCache:
        batch, groups, slots = cache.position.shape
        k = self.held(slots, look.layer, look.depth)
        worth = self._protect(cache, look, k)
        best = keep_pooled(worth, k, floor=self.floor, valid=cache.valid)
        map_, _ = keep_where(best.reshape(batch, 1, groups * slots), groups * k)
        return pool_heads(cache, range(groups)).keep(map_)

    def write(self, cache: LayerCache, k: Array, v: Array, position: Array, valid: Any) -> Any:
        return append_to_pool(cache, k, v, position, valid)


@register("adakv", family="evict", site="cache", paper="AdaKV 2024", golden=("kv/adakv",))
def adakv(
    layout: Layout,
    *,
    keep: float = 0.2,
    budget: int | None = None,
    window: int = 32,
    kernel: int = 5,
    floor: float = 0.2,
) -> Plan:
    """SnapKV with one budget for all key heads of a layer.

    keep: share of a prompt's entries; budget: their mean number per head instead. floor: what share
    of it every head has in any case.
    """
    how = AdaKV(budget or keep, recent=window, kernel=kernel, floor=floor)
    return Plan(((Site("cache"), how),), name="adakv")
