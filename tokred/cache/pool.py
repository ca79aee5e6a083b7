"""One pool of slots for all key heads of a layer: each slot belongs to one head, see
`LayerCache.owner`, so that heads may hold different numbers of entries and bytes fall with their
sum.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from tokred.cache.slots import LayerCache

SLOTS = ("k", "v", "position", "score", "bias")


def take_heads(cache: LayerCache, heads: Sequence[int]) -> LayerCache:
    """Some key heads (static) of a cache alone."""
    index = jnp.array(heads, jnp.int32)
    return _each(cache, lambda x: jnp.take(x, index, axis=1))


def pool_heads(cache: LayerCache, heads: Sequence[int]) -> LayerCache:
    """All slots in one row, head after head; heads: by which number each is called (static)."""
    batch, groups, slots = cache.position.shape
    flat = lambda x: x.reshape(batch, 1, groups * slots, *x.shape[3:])  # noqa: E731
    owner = jnp.broadcast_to(jnp.array(heads, jnp.int32)[None, :, None], cache.position.shape)
    return dataclasses.replace(_each(cache, flat), owner=flat(owner))


def join_pools(first: LayerCache, *others: LayerCache) -> LayerCache:
    """One pool of several, which hold the same fields."""
    names = [name for name in (*SLOTS, "owner") if getattr(first, name) is not None]
    pools = (first, *others)
    joined = {n: jnp.concatenate([getattr(p, n) for p in pools], axis=2) for n in names}
    return dataclasses.replace(first, **joined)


def append_to_pool(
    pool: LayerCache,
    k: Float[Array, "B N G E"],
    v: Float[Array, "B N G E"],
    position: Num[Array, "B N"],
    valid: Bool[Array, "B N"] | None = None,
) -> LayerCache:
    """`LayerCache.append` for a pool: every head's entry takes a slot of its own, the heads one
    after another."""
    batch, n, groups, width = k.shape
    each = lambda x: jnp.repeat(x, groups, axis=1)  # noqa: E731
    single = lambda x: x.reshape(batch, n * groups, 1, width)  # noqa: E731
    before = pool.valid
    write = None if valid is None else each(valid)
    pool = pool.append(single(k), single(v), each(position), write)
    new = pool.valid & ~before
    owner = jnp.where(new, (jnp.cumsum(new, axis=-1) - 1) % groups, pool.owner)
    return dataclasses.replace(pool, owner=owner)


def _each(cache: LayerCache, move: Any) -> LayerCache:
    held = {name: getattr(cache, name) for name in SLOTS}
    moved = {name: move(x) for name, x in held.items() if x is not None}
    return dataclasses.replace(cache, **moved)
