"""KIVI (Liu et al. 2024): cache entries in few bits, the latest ones as they are.

Official code: jy-yuan/KIVI (MIT).
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from tokred.cache import CacheReduction, LayerCache, Look
from tokred.cache.quantise import BITS, Quantised, bits_within, quantise
from tokred.methods.registry import register
from tokred.ops import gather, put
from tokred.plan import Layout, Plan, Site


@dataclass(frozen=True)
class KIVI(CacheReduction):
    """Keys by channel in groups of `group` entries, values by entry in groups of `group` channels,
    `bits` each. The last `residual` values, and the keys since the last whole `residual`, keep full
    precision; nothing leaves.

    A slot's number is its token's place in the text; the slots of full precision are a ring. So
    memory is that of the codes, and every step makes the values anew.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.residual % self.group or self.residual % (8 // self.bits):
            raise ValueError(
                f"kivi: bits={self.bits} must be one of {BITS} and residual={self.residual} a "
                f"multiple of group={self.group} and of {8 // min(self.bits, 8)}; change them."
            )

    def room(self, prompt: int, length: int, layer: int, depth: int) -> int:
        return -(-length // self.residual) * self.residual

    def settle(self, cache: LayerCache) -> LayerCache:
        """Everything in codes, and the latest entries in the ring as well."""
        self._check_width(cache.v.shape[-1])
        slot = jnp.arange(self.residual)[None, None]
        last = cache.length[..., None] - 1
        ring = jnp.maximum(last - (last - slot) % self.residual, 0)
        recent = lambda x: gather(x, ring, axis=2)  # noqa: E731
        stored = self._keys(cache.k), self._values(cache.v)
        return replace(cache, k=recent(cache.k), v=recent(cache.v), extra=stored)

    def _check_width(self, width: int) -> None:
        if width % self.group:
            raise ValueError(
                f"kivi: heads of {width} channels are no groups of {self.group}; change group."
            )

    def _keys(self, k: Array) -> Quantised:
        return quantise(k, self.bits, axis=-2, group=self.group)

    def _values(self, v: Array) -> Quantised:
        return quantise(v, self.bits, axis=-1, group=self.group)

    def write(self, cache: LayerCache, k: Array, v: Array, position: Array, valid: Any) -> Any:
        if k.shape[1] > 1:
            raise ValueError(
                f"kivi: {k.shape[1]} tokens at once behind the prompt; give it one at a time."
            )
        n, live = cache.length, jnp.ones(position.shape, bool) if valid is None else valid
        at = jnp.where(live, n, cache.capacity)[..., None]  # [B G 1], out of reach if not
        slot = jnp.where(live, n % self.residual, self.residual)[..., None]
        keys, values = cache.extra
        leaving = self._values(gather(cache.v, n[..., None] % self.residual, axis=2))
        before = jnp.where(at >= self.residual, at - self.residual, cache.capacity)
        values = _put_rows(values, leaving, before)
        cache = replace(
            cache,
            k=put(cache.k, slot, jnp.swapaxes(k, 1, 2), axis=2),
            v=put(cache.v, slot, jnp.swapaxes(v, 1, 2), axis=2),
            position=put(cache.position, at, jnp.broadcast_to(position[:, None], at.shape), axis=2),
        )
        full = live & ((n + 1) % self.residual == 0)
        block = jnp.where(full, n // self.residual, cache.capacity)
        # In every step: to ask whether it is time would be a talk between devices.
        keys = _put_block(keys, self._keys(cache.k), block)
        return replace(cache, extra=(keys, values))

    def read(self, cache: LayerCache, look: Look) -> LayerCache:
        keys, values = cache.extra
        times = cache.capacity // self.residual
        n, slot = cache.length[..., None], jnp.arange(cache.capacity)[None, None]
        wide = lambda x: jnp.tile(x, (1, 1, times, 1))  # noqa: E731
        whole = (slot >= n // self.residual * self.residual)[..., None]
        late = (slot >= n - self.residual)[..., None]
        k = jnp.where(whole, wide(cache.k), keys.values())
        v = jnp.where(late, wide(cache.v), values.values())
        return replace(cache, k=k, v=v, extra=None)


def _put_rows(x: Quantised, rows: Quantised, at: Int[Array, "B G 1"]) -> Quantised:
    """Entries at `at`; channels share a step, so that every entry is stored for itself."""
    store = lambda old, new: put(old, at, new, axis=2)  # noqa: E731
    return jax.tree.map(store, x, replace(rows, count=x.count))


def _put_block(x: Quantised, block: Quantised, number: Int[Array, "B G"]) -> Quantised:
    """A run of entries as the block of this number; entries share a step."""
    words, groups = block.codes.shape[2], block.least.shape[3]
    run = lambda size: number[..., None] * size + jnp.arange(size)[None, None]  # noqa: E731
    steps = lambda old, new: put(old, run(groups)[:, :, None], new, axis=3)  # noqa: E731
    return replace(
        x,
        codes=put(x.codes, run(words), block.codes, axis=2),
        least=steps(x.least, block.least),
        step=steps(x.step, block.step),
    )


@register("kivi", family="quantise", site="cache", paper="KIVI 2024", golden=("kv/kivi",))
def kivi(
    layout: Layout,
    *,
    keep: float | None = None,
    bits: int = 2,
    group: int = 32,
    residual: int = 128,
) -> Plan:
    """Cache entries in few bits, but for the latest.

    keep: of 16 bits; codes take the most bits within it. Other options: see `KIVI`.
    """
    bits = bits if keep is None else bits_within(keep)
    how = KIVI(bits=bits, group=group, residual=residual)
    return Plan(((Site("cache"), how),), name="kivi")
