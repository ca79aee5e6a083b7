"""ZipCache (He et al. 2024): salient cache entries in more bits, the others in fewer.

Official code: ThisisBillhe/ZipCache (MIT).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokred.cache import (
    CacheReduction,
    LayerCache,
    Look,
    Quantised,
    Scaled,
    channel_scale,
    group_heads,
    join_heads,
    quantise,
    quantise_scaled,
    score_by_received,
)
from tokred.cache.quantise import mixed_bits
from tokred.maps import Keep
from tokred.methods.registry import register
from tokred.ops import gather, put
from tokred.ops.gather import aligned
from tokred.plan import Layout, Plan, Site
from tokred.select import keep_top_k


class Entries(NamedTuple):
    """Some entries of a cache, as many of every key head; position -1 = none."""

    k: Float[Array, "B G T E"]
    v: Float[Array, "B G T E"]
    position: Float[Array, "B G T"]

    @property
    def live(self) -> Bool[Array, "B G T 1"]:
        return (self.position >= 0)[..., None]


class Stored(NamedTuple):
    """The same in few bits."""

    keys: Quantised
    values: Scaled
    position: Float[Array, "B G T"]

    def entries(self) -> Entries:
        return Entries(self.keys.values(), self.values.values(), self.position)


@dataclass(frozen=True)
class ZipCache(CacheReduction):
    """Of a prompt the share `salient` of the entries, those with the most attention per query that
    could see them, in `high` bits, the others in `low`; nothing leaves.

    Attention is that of the last queries and of as many others, evenly spread (official: drawn),
    the share `probes` of a prompt each. Keys share a step by channel, each kind for itself; values
    by entry of all heads, after their channels are brought to one size. So every key head has its
    own salient entries, and the values of a step belong to different tokens, as released.

    What is generated keeps full precision until it is `gap` entries (None: always). Of these the
    share `salient` that the newest query looks at most then takes `high` bits, the others `low`,
    and what was stored before is quantised again together with them, as released. To see whether it
    is time, all examples are asked.
    """

    salient: float = 0.6
    high: int = 4
    low: int = 2
    probes: float = 0.05
    gap: int | None = 100

    def __post_init__(self) -> None:
        if not (0 < self.salient < 1 and 0 < self.probes < 1):
            raise ValueError(
                f"zipcache: salient={self.salient} and probes={self.probes} are shares in (0, 1); "
                "change them."
            )
        if self.gap is not None and self.gap < 1:
            raise ValueError(f"zipcache: gap={self.gap} must be at least 1, or None.")

    def room(self, prompt: int, length: int, layer: int, depth: int) -> int:
        more = max(1, length - prompt)
        return more if self.gap is None else min(more, self.gap)

    def flushes(self, cache: LayerCache) -> int:
        """How often so many tokens come that they are stored."""
        more = cache.extent.length - cache.extent.prompt
        return 0 if self.gap is None else more // self.gap

    def parts(self, count: int) -> tuple[int, int]:
        """How many of so many entries are salient, and how many are not."""
        low = int((1 - self.salient) * count)
        return count - low, low

    def begin(self, cache: LayerCache, look: Look) -> LayerCache:
        """No slot is left; all of the prompt is in `extra`, with room for what is to come."""
        high, low = self._split(cache, self.score(cache, look))
        more, less = (self.flushes(cache) * n for n in self.parts(self.gap or 0))
        none = jnp.zeros((*cache.position.shape[:2], 0), jnp.int32)
        left = cache.keep(Keep(none, cache.capacity))
        return replace(left, extra=self._store(_grow(high, more), _grow(low, less)))

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

    def _split(self, cache: LayerCache, worth: Float[Array, "B G C"]) -> tuple[Entries, Entries]:
        """The salient entries of all slots, and the others."""
        high, _ = self.parts(cache.capacity)
        index = keep_top_k(worth, cache.capacity, valid=cache.valid).index
        maps = (Keep(part, cache.capacity) for part in jnp.split(index, [high], axis=-1))
        high, low = (Entries(*m.apply((cache.k, cache.v, cache.position))) for m in maps)
        return high, low

    def _store(self, high: Entries, low: Entries) -> tuple[Stored, Stored]:
        values = [jnp.where(part.live, part.v, 0.0) for part in (high, low)]
        scale = channel_scale(join_heads(jnp.concatenate(values, axis=2)))
        return _quantise(high, self.high, scale), _quantise(low, self.low, scale)

    def read(self, cache: LayerCache, look: Look) -> LayerCache:
        if cache.extra is None:
            raise ValueError("zipcache: nothing is stored yet; read a prompt as a whole first.")
        parts = [stored.entries() for stored in cache.extra]
        parts.append(Entries(cache.k, cache.v, cache.position))
        k, v, place = (jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))
        return replace(cache, k=k, v=v, position=place, extra=None)

    def go_on(self, cache: LayerCache, look: Look) -> LayerCache:
        """Raises ValueError for several tokens at once where some are to be stored."""
        if not self.flushes(cache):
            return cache
        if look.q.shape[1] > 1:
            raise ValueError(
                f"zipcache: {look.q.shape[1]} tokens at once behind the prompt; give it one at a "
                "time, or set gap=None."
            )
        full = cache.length[:, 0] == self.gap
        return jax.lax.cond(full.any(), lambda: self._flush(cache, look, full), lambda: cache)

    def _flush(self, cache: LayerCache, look: Look, full: Bool[Array, " B"]) -> LayerCache:
        """All slots are stored, in the examples where they are full."""
        seen = look.probs(self.read(cache, look))[:, :, 0]
        worth = group_heads(seen, cache.k.shape[1])[..., -cache.capacity :]
        pairs = zip(cache.extra, self._split(cache, worth), strict=True)
        high, low = (_put(old.entries(), new, self.flushes(cache)) for old, new in pairs)
        chosen = lambda new, old: jnp.where(aligned(full, new.ndim, 0), new, old)  # noqa: E731
        stored = jax.tree.map(chosen, self._store(high, low), cache.extra)
        gone = jnp.broadcast_to(full[:, None, None], cache.position.shape)
        return replace(cache.drop(gone), extra=stored)


def _quantise(part: Entries, bits: int, scale: Array) -> Stored:
    """Rows without an entry are those of the first one, so that they change no step."""
    first = part.live.argmax(2)  # [B G 1]
    k, v = (jnp.where(part.live, x, gather(x, first, axis=2)) for x in (part.k, part.v))
    keys = quantise(k, bits, axis=-2, group=k.shape[-2])
    return Stored(keys, quantise_scaled(v, bits, scale), part.position)


def _grow(part: Entries, more: int) -> Entries:
    """With so many places more, empty ones; at least one in all."""
    more = max(more, 1 - part.position.shape[-1])
    longer = lambda x, fill: jnp.pad(  # noqa: E731
        x, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3), constant_values=fill
    )
    return Entries(longer(part.k, 0), longer(part.v, 0), longer(part.position, -1))


def _put(part: Entries, more: Entries, flushes: int) -> Entries:
    """With some entries in the first free places of the last ones, which `flushes` such fill."""
    n = more.position.shape[-1]
    first = part.position.shape[-1] - flushes * n
    filled = (part.position[..., first:] >= 0).sum(-1, keepdims=True)
    at = first + filled + aligned(jnp.arange(n), filled.ndim, filled.ndim - 1)
    rows = zip(part, more, strict=True)
    return Entries(*(put(old, at, new.astype(old.dtype), axis=2) for old, new in rows))


@register(
    "zipcache",
    family="quantise",
    site="cache",
    paper="ZipCache 2024",
    golden=("kv/zipcache", "kv/zipcache_cst4"),
)
def zipcache(
    layout: Layout,
    *,
    keep: float | None = None,
    salient: float = 0.6,
    high: int = 4,
    low: int = 2,
    probes: float = 0.05,
    gap: int | None = 100,
) -> Plan:
    """Cache entries that are looked at in more bits than the others.

    keep: of 16 bits, for a mean entry; it sets salient, high and low, which are those of 0.2
    otherwise. Other options: see `ZipCache`.
    """
    if keep is not None:
        high, low, salient = mixed_bits(keep)
    how = ZipCache(salient=salient, high=high, low=low, probes=probes, gap=gap)
    return Plan(((Site("cache"), how),), name="zipcache")
