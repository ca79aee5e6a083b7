"""The key-value cache: fixed slots, so that prefill and every decode step have static shapes.

Order does not matter to attention once keys carry their position: a slot holds any token. A token
that skipped a layer has no entry there, so layers differ in how many slots they fill.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from tokred.maps import Keep
from tokred.ops import position_mask
from tokred.tokens import Tokens

register = functools.partial(jax.tree_util.register_dataclass, meta_fields=[])


@functools.partial(
    register,
    data_fields=["k", "v", "position", "length", "dropped", "score", "bias"],
)
@dataclass(frozen=True)
class LayerCache:
    """One layer's slots: C for every example and key head.

    k, v: Float[B G C E], keys already rotated · position: Float[B G C], -1 = empty
    · length: Int[B G], slots in use; they come first · dropped: Int[B], entries that found no slot
    · score: Float[B G C] or None, what an eviction ranks by · bias: Float[B G C] or None, added to
    the slot's attention logits.
    """

    k: Any
    v: Any
    position: Any
    length: Any
    dropped: Any
    score: Any = None
    bias: Any = None

    @property
    def capacity(self) -> int:
        """C, static."""
        return self.k.shape[-2]

    @property
    def valid(self) -> Bool[Array, "B G C"]:
        """Which slots hold a token."""
        return self.position >= 0

    def mask(
        self, queries: Num[Array, "B N P"], window: int | None = None
    ) -> Bool[Array, "B G N C"]:
        """The slots that each query may see: those of tokens not after it, see `position_mask`."""
        keys = self.position[..., None]
        seen = position_mask(queries[:, None, :, :1], keys, window)
        return seen & self.valid[..., None, :]

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
        write = jnp.ones(position.shape, bool) if write is None else write
        rank = jnp.cumsum(write, axis=-1)[:, None, :] - 1  # [B 1 N]
        slot = jnp.where(write[:, None, :], self.length[..., None] + rank, self.capacity)
        heads_first = lambda a: jnp.swapaxes(a, 1, 2)  # noqa: E731
        place = jnp.broadcast_to(position[:, None, :], slot.shape)
        used = self.length + write.sum(-1)[:, None]
        length = jnp.minimum(used, self.capacity).astype(self.length.dtype)
        more = (used - length).max(-1).astype(self.dropped.dtype)
        return dataclasses.replace(
            self,
            k=_put(self.k, slot, heads_first(k)),
            v=_put(self.v, slot, heads_first(v)),
            position=_put(self.position, slot, place),
            length=length,
            dropped=self.dropped + more,
        )

    def keep(self, map_: Keep) -> "LayerCache":
        """Eviction: the slots that a map with leading axes (B, G) keeps; their number may shrink.

        Kept slots must come first where `map_.valid` is given.
        """
        k, v, score, bias = map_.apply((self.k, self.v, self.score, self.bias))
        position = jnp.where(_kept(map_), map_.apply(self.position), -1.0)
        length = (position >= 0).sum(-1).astype(self.length.dtype)
        return dataclasses.replace(
            self, k=k, v=v, position=position, length=length, score=score, bias=bias
        )


def _kept(map_: Keep) -> Array:
    return jnp.ones(map_.index.shape, bool) if map_.valid is None else map_.valid


def _put(slots: Array, slot: Array, rows: Array) -> Array:
    """rows [B G N ...] written into slots [B G C ...]; local on a sharded batch."""
    put = lambda old, at, new: old.at[at].set(new.astype(old.dtype), mode="drop")  # noqa: E731
    return jax.vmap(jax.vmap(put))(slots, slot, rows)


@functools.partial(register, data_fields=["layers", "seen"])
@dataclass(frozen=True)
class KVCache:
    """layers: a LayerCache for every layer · seen: Int[B], tokens so far, the next position."""

    layers: Any
    seen: Any

    def nbytes(self) -> int:
        """Bytes of keys and values in all slots."""
        return sum(a.size * a.dtype.itemsize for c in self.layers for a in (c.k, c.v))

    def occupancy(self) -> Int[Array, "B L"]:
        """Slots in use, mean over heads rounded down, per example and layer."""
        return jnp.stack([c.length.sum(-1) // c.length.shape[-1] for c in self.layers], -1)


def make_layer_cache(
    batch: int, heads: int, capacity: int, width: int, dtype: Any = jnp.float32
) -> LayerCache:
    """Empty slots; width: of one key head."""
    shape = (batch, heads, capacity)
    return LayerCache(
        k=jnp.zeros((*shape, width), dtype),
        v=jnp.zeros((*shape, width), dtype),
        position=jnp.full(shape, -1.0),
        length=jnp.zeros(shape[:2], jnp.int32),
        dropped=jnp.zeros((batch,), jnp.int32),
    )


def make_cache(
    batch: int, heads: int, capacities: Sequence[int], width: int, dtype: Any = jnp.float32
) -> KVCache:
    """An empty cache; capacities: slots of each layer.

    Raises:
      ValueError: a layer without slots.
    """
    for layer, capacity in enumerate(capacities):
        if capacity < 1:
            raise ValueError(
                f"make_cache: layer {layer} has {capacity} slots; give every layer at least one."
            )
    layers = [make_layer_cache(batch, heads, c, width, dtype) for c in capacities]
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
