"""The key-value cache: fixed slots, so that prefill and every decode step have static shapes.

Order does not matter to attention once keys carry their position: a slot holds any token, and an
eviction only marks it empty. A token that skipped a layer has no entry there, so layers differ in
how many slots they fill.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from tokred.maps import Keep
from tokred.ops import gather, position_mask, put
from tokred.ops.attention import NEGATIVE
from tokred.rotary import rotate_by
from tokred.tokens import Tokens

register = functools.partial(jax.tree_util.register_dataclass, meta_fields=[])


class Extent(NamedTuple):
    """How many tokens a cache is made for: of the prompt, and in all; 0 where it is not known."""

    prompt: int = 0
    length: int = 0


UNKNOWN = Extent()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "position", "dropped", "score", "bias", "owner", "extra"],
    meta_fields=["raw", "gapless", "extent"],
)
@dataclass(frozen=True)
class LayerCache:
    """One layer's slots: C for every example and key head.

    k, v: Float[B G C E], keys already rotated · position: Float[B G C], -1 = empty
    · dropped: Int[B], entries that found no slot · score: Float[B G C] or None, what an eviction
    ranks by, 0 for new entries · bias: Float[B G C] or None, added to the slot's attention logits
    · owner: Int[B 1 C] or None: the slots are one pool (G = 1), each of one key head alone
    · extra: what a method stores beside, or in place of, the slots; it is as it left it
    · raw: keys are not rotated yet · gapless: whenever entries leave, the others get positions
    without gaps · extent: what a model's `make_cache` was asked for; all three static.
    """

    k: Any
    v: Any
    position: Any
    dropped: Any
    score: Any = None
    bias: Any = None
    owner: Any = None
    extra: Any = None
    raw: bool = False
    gapless: bool = False
    extent: Extent = UNKNOWN

    @property
    def capacity(self) -> int:
        """C, static."""
        return self.position.shape[-1]

    @property
    def valid(self) -> Bool[Array, "B G C"]:
        """Which slots hold a token."""
        return self.position >= 0

    @property
    def length(self) -> Int[Array, "B G"]:
        """Slots in use."""
        return self.valid.sum(-1, dtype=jnp.int32)

    def entries(self, heads: int) -> Int[Array, "B heads"]:
        """Entries of every key head, of which there are so many; a pool tells whose each is."""
        if self.owner is None:
            return jnp.broadcast_to(self.length, (len(self.length), heads))
        theirs = self.valid & (self.owner == jnp.arange(heads)[None, :, None])
        return theirs.sum(-1, dtype=jnp.int32)

    def mask(
        self, queries: Num[Array, "B N P"], window: int | None = None
    ) -> Bool[Array, "B G N C"]:
        """The slots that each query may see: those of tokens not after it, see `position_mask`."""
        keys = self.position[..., None]
        seen = position_mask(queries[:, None, :, :1], keys, window)
        return seen & self.valid[..., None, :]

    def apart(self, heads: int, groups: int) -> Float[Array, "B H 1 C"] | None:
        """What hides the slots of a pool from all heads but their own; None where there is none."""
        if self.owner is None:
            return None
        mine = jnp.arange(heads)[None, :, None] // (heads // groups) == self.owner
        return jnp.where(mine, 0.0, NEGATIVE)[:, :, None]

    def append(
        self,
        k: Float[Array, "B N G E"],
        v: Float[Array, "B N G E"],
        position: Num[Array, "B N"],
        write: Bool[Array, "B N"] | None = None,
    ) -> "LayerCache":
        """The entries of the tokens to `write` (None: all), each in the next free slot.

        Entries beyond the capacity are dropped and counted.
        """
        n = position.shape[-1]
        if write is None:
            write, rank = jnp.ones(position.shape, bool), jnp.arange(n)[None]
        else:
            rank = jnp.cumsum(write, axis=-1) - 1
        rank, free = jnp.broadcast_to(rank, position.shape)[:, None], self._free(n)
        slot = gather(free, jnp.clip(rank, 0, free.shape[-1] - 1), axis=2)
        slot = jnp.where(write[:, None, :] & (rank < free.shape[-1]), slot, self.capacity)
        heads_first = lambda a: jnp.swapaxes(a, 1, 2)  # noqa: E731
        lost = (write[:, None, :] & (slot == self.capacity)).sum(-1).max(-1)
        zero = jnp.zeros(slot.shape)
        into = lambda old, new: put(old, slot, new.astype(old.dtype), axis=2)  # noqa: E731
        return dataclasses.replace(
            self,
            k=into(self.k, heads_first(k)),
            v=into(self.v, heads_first(v)),
            position=into(self.position, jnp.broadcast_to(position[:, None, :], slot.shape)),
            dropped=self.dropped + lost.astype(self.dropped.dtype),
            score=None if self.score is None else into(self.score, zero),
            bias=None if self.bias is None else into(self.bias, zero),
        )

    def _free(self, n: int) -> Int[Array, "B G M"]:
        """The first n empty slots, C where there are no more."""
        slots = jnp.arange(self.capacity)[None, None]
        empty = jnp.where(self.valid, self.capacity, slots)
        if n == 1:
            return empty.min(-1, keepdims=True)
        return jax.lax.sort(empty, dimension=2)[..., :n]

    def keep(self, map_: Keep) -> "LayerCache":
        """The slots that a map with leading axes (B, G) keeps; their number may shrink."""
        moved = {
            name: map_.apply(getattr(self, name)) for name in ("k", "v", "score", "bias", "owner")
        }
        position = jnp.where(live(map_), map_.apply(self.position), -1.0)
        return dataclasses.replace(self, position=position, **moved)

    def drop(self, gone: Bool[Array, "B G C"]) -> "LayerCache":
        """The same without some entries, whose slots are empty now; nothing is moved."""
        return dataclasses.replace(self, position=jnp.where(gone, -1.0, self.position))

    def placed(self, rates: Float[Array, " half"] | None) -> "LayerCache":
        """The same with `raw` keys turned to their positions; rates: of the rotation."""
        if not self.raw or rates is None:
            return self
        return dataclasses.replace(self, k=rotate_by(self.k, self.position, rates), raw=False)

    def renumber(
        self, rates: Float[Array, " half"] | None = None, where: Bool[Array, "B G"] | None = None
    ) -> "LayerCache":
        """Positions without gaps, in the order that they have; keys that are not `raw` are turned
        by the difference (`rates` of the rotation). where: in which rows, None for all."""
        order = jnp.where(self.valid, self.position, jnp.inf)
        rank = jnp.argsort(jnp.argsort(order, axis=-1), axis=-1).astype(self.position.dtype)
        moves = self.valid if where is None else self.valid & where[..., None]
        new = jnp.where(moves, rank, self.position)
        if self.raw:
            return dataclasses.replace(self, position=new)
        if rates is None:
            raise ValueError(
                "LayerCache.renumber: keys without rotary positions cannot be turned to others; "
                "keep positions as they are."
            )
        return dataclasses.replace(
            self, k=rotate_by(self.k, new - self.position, rates), position=new
        )

    def resize(self, capacity: int) -> "LayerCache":
        """More slots, empty ones. Raises ValueError for fewer."""
        more = capacity - self.capacity
        if more < 0:
            raise ValueError(
                f"LayerCache: {self.capacity} slots cannot become {capacity}; evict with keep()."
            )
        grow = lambda a, fill: jnp.pad(  # noqa: E731
            a, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (a.ndim - 3), constant_values=fill
        )
        slots = {name: getattr(self, name) for name in ("k", "v", "score", "bias", "owner")}
        wider = {name: None if a is None else grow(a, 0) for name, a in slots.items()}
        return dataclasses.replace(self, position=grow(self.position, -1), **wider)


def hold(
    k: Float[Array, "B N G E"],
    v: Float[Array, "B N G E"],
    position: Num[Array, "B N"],
    valid: Bool[Array, "B N"] | None = None,
    raw: bool = False,
    extent: Extent = UNKNOWN,
) -> LayerCache:
    """A cache of these tokens alone, valid ones first, as many slots as tokens. raw, extent: see
    `LayerCache`."""
    place = position if valid is None else jnp.where(valid, position, -1.0)
    place = jnp.broadcast_to(place[:, None, :], (k.shape[0], k.shape[2], k.shape[1]))
    none = jnp.zeros((k.shape[0],), jnp.int32)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    held = LayerCache(k, v, place, none, raw=raw, extent=extent)
    if valid is None:
        return held
    first = jnp.argsort(~held.valid, axis=-1, stable=True).astype(jnp.int32)
    return held.keep(Keep(first, first.shape[-1], None))


def live(map_: Keep) -> Bool[Array, "*B K"]:
    """Which outputs of a map hold a token."""
    return jnp.ones(map_.index.shape, bool) if map_.valid is None else map_.valid


@functools.partial(register, data_fields=["layers", "seen"])
@dataclass(frozen=True)
class KVCache:
    """layers: a LayerCache for every layer · seen: Int[B], tokens so far, the next position."""

    layers: Any
    seen: Any

    def nbytes(self) -> int:
        """Bytes of keys and values, in slots and in what methods store in their place."""
        held = jax.tree.leaves([(c.k, c.v, c.extra) for c in self.layers])
        return sum(a.size * a.dtype.itemsize for a in held)

    def advance(self, layers: Sequence[LayerCache], seen: Num[Array, " B"]) -> "KVCache":
        """The cache after a step; seen: where its next token stands, unless positions have no
        gaps."""
        if layers[0].gapless:
            seen = jnp.stack([layer.length.max(-1) for layer in layers]).max(0)
        return KVCache(tuple(layers), seen.astype(jnp.int32))

    def occupancy(self) -> Int[Array, "B L"]:
        """Slots in use, mean over heads rounded down, per example and layer."""
        return jnp.stack([c.length.sum(-1) // c.length.shape[-1] for c in self.layers], -1)

    def entries(self, heads: int) -> Int[Array, "B L heads"]:
        """Entries by example, layer and key head; heads: `kv_heads` of the model."""
        return jnp.stack([c.entries(heads) for c in self.layers], 1)


def make_layer_cache(
    batch: int,
    heads: int,
    capacity: int,
    width: int,
    dtype: Any = jnp.float32,
    raw: bool = False,
) -> LayerCache:
    """Empty slots; width: of one key head. raw: see `LayerCache`."""
    shape = (batch, heads, capacity)
    return LayerCache(
        k=jnp.zeros((*shape, width), dtype),
        v=jnp.zeros((*shape, width), dtype),
        position=jnp.full(shape, -1.0),
        dropped=jnp.zeros((batch,), jnp.int32),
        raw=raw,
    )


def make_cache(
    batch: int,
    heads: int,
    capacities: Sequence[int],
    width: int,
    dtype: Any = jnp.float32,
    raw: bool = False,
) -> KVCache:
    """An empty cache; capacities: slots of each layer. raw: see `LayerCache`.

    Raises:
      ValueError: a layer without slots.
    """
    for layer, capacity in enumerate(capacities):
        if capacity < 1:
            raise ValueError(
                f"make_cache: layer {layer} has {capacity} slots; give every layer at least one."
            )
    layers = [make_layer_cache(batch, heads, c, width, dtype, raw) for c in capacities]
    return KVCache(tuple(layers), jnp.zeros((batch,), jnp.int32))


@functools.partial(register, data_fields=["tokens", "k", "v"])
@dataclass(frozen=True)
class Memory:
    """What a cross-attention looks at: tokens with their gates, and Float[B M H E] keys and values
    that one layer has projected of them, or None where it still has to."""

    tokens: Tokens
    k: Any = None
    v: Any = None

    @property
    def projected(self) -> bool:
        return self.k is not None
