"""ZipCache (He et al. 2024): salient cache entries in more bits, the others in fewer.

Official code: ThisisBillhe/ZipCache (MIT). There the entries of a prompt are stored so, and those
that follow again after every 100; here what is generated keeps full precision.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tokred.cache import (
    CacheReduction,
    LayerCache,
    Look,
    channel_scale,
    join_heads,
    quantise,
    quantise_scaled,
    score_by_received,
)
from tokred.maps import Keep
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Site
from tokred.select import keep_top_k


@dataclass(frozen=True)
class ZipCache(CacheReduction):
    """Of a prompt the share `salient` of the entries, those with the most attention per query that
    could see them, in `high` bits, the others in `low`; nothing leaves.

    Attention is that of the last queries and of as many others, evenly spread (official: drawn),
    the share `probes` of a prompt each. Keys share a step by channel, each kind for itself; values
    by entry of all heads, after their channels are brought to one size. So every key head has its
    own salient entries, and the values of a step belong to different tokens, as released.
    """

    salient: float = 0.6
    high: int = 4
    low: int = 2
    probes: float = 0.05

    def __post_init__(self) -> None:
        if not (0 < self.salient < 1 and 0 < self.probes < 1):
            raise ValueError(
                f"zipcache: salient={self.salient} and probes={self.probes} are shares in (0, 1); "
                "change them."
            )

    def room(self, prompt: int, length: int, layer: int, depth: int) -> int:
        return max(1, length - prompt)

    def begin(self, cache: LayerCache, look: Look) -> LayerCache:
        """No slot is left; all of the prompt is in `extra`."""
        worth, prompt = self.score(cache, look), cache.capacity
        few = prompt - int((1 - self.salient) * prompt)
        ranked = keep_top_k(worth, prompt, valid=cache.valid)
        kinds = ((ranked.index[..., :few], self.high), (ranked.index[..., few:], self.low))
        scale = channel_scale(join_heads(jnp.where(cache.valid[..., None], cache.v, 0.0)))
        stored = tuple(self._store(cache, index, bits, scale) for index, bits in kinds)
        none = jnp.zeros((*cache.position.shape[:2], 0), jnp.int32)
        return replace(cache.keep(Keep(none, cache.capacity)), extra=stored)

    def score(self, cache: LayerCache, look: Look) -> Array:
        prompt = look.q.shape[1]
        count = max(1, int(self.probes * prompt))
        early = look.newest[:, None] - count
        spread = jnp.floor(jnp.arange(count)[None] * (early + 1) / count)
        chosen = (look.position[..., None] == spread[:, None, :]).any(-1)
        asked = (look.position > early) | (chosen & (look.position >= 0))
        probed = replace(look, position=jnp.where(asked, look.position, -1.0)).last(2 * count)
        viewers = look.newest[:, None] - cache.position[:, 0] + 1
        return score_by_received(probed.received(cache), viewers, cache.k.shape[1])

    def _store(self, cache: LayerCache, index: Array, bits: int, scale: Array) -> Any:
        """(keys, values, positions) of some entries; those of empty slots are the first one's."""
        map_ = Keep(index, cache.capacity)
        k, v, place = map_.apply((cache.k, cache.v, cache.position))
        live = (place >= 0)[..., None]
        k, v = (jnp.where(live, x, x[:, :, :1]) for x in (k, v))
        keys = quantise(k, bits, axis=-2, group=k.shape[-2])
        return keys, quantise_scaled(v, bits, scale), place

    def read(self, cache: LayerCache, look: Look) -> LayerCache:
        if cache.extra is None:
            raise ValueError("zipcache: nothing is stored yet; read a prompt as a whole first.")
        parts = [(keys.values(), values.values(), place) for keys, values, place in cache.extra]
        parts.append((cache.k, cache.v, cache.position))
        k, v, place = (jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))
        return replace(cache, k=k, v=v, position=place, extra=None)


@register(
    "zipcache",
    family="quantise",
    site="cache",
    paper="ZipCache 2024",
    golden=("kv/zipcache", "kv/zipcache_cst4"),
)
def zipcache(
    layout: Layout, *, salient: float = 0.6, high: int = 4, low: int = 2, probes: float = 0.05
) -> Plan:
    """Cache entries that are looked at in more bits than the others.

    Options: see `ZipCache`.
    """
    how = ZipCache(salient=salient, high=high, low=low, probes=probes)
    return Plan(((Site("cache"), how),), name="zipcache")
