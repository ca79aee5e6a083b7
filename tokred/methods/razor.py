"""RazorAttention (Tang et al. 2024, arXiv 2407.15891): few heads look far back; they keep all.

The authors' code is not public. A vendor's (MindSpore golden-stick, Apache-2.0) differs from the
paper: it folds once, after the prompt (`spare=None`), and the slot that stands for many entries
weighs no more than one (`weighted=False`). Keys are averaged as the vendor does, after their
rotation. Heads are found by `tokred.cache.score_heads` and `choose_heads`.

The entries of a layer lie in one pool, see `tokred.cache.pool`: bytes fall by what the other heads
drop. A query's products with the slots of other heads are computed and hidden.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from tokred.cache import (
    CacheReduction,
    LayerCache,
    Look,
    append_to_pool,
    fold_middle,
    join_pools,
    pool_heads,
    take_heads,
)
from tokred.maps import Mix
from tokred.methods.registry import register
from tokred.ops import gather, put, top_k
from tokred.plan import Layout, Plan, Site


@dataclass(frozen=True)
class RazorAttention(CacheReduction):
    """Key heads that are True in `heads` (for each layer, one for each key head) keep every entry;
    of the others the first `sinks` and the latest entries stay, and those between share one slot,
    their mean. The slot stands at the first of them, and weighs as much as all (weighted).

    budget: entries of such a head, sinks and the shared slot included, or, as a float, their share
    of a prompt, but at least `least` (official: 0.2 and 4000). spare: how many entries come before
    as many are folded again; None where none is folded after the prompt. All static.
    """

    pooled: ClassVar[bool] = True
    heads: tuple[tuple[bool, ...], ...]
    budget: int | float = 0.2
    least: int = 0
    spare: int | None = 1
    sinks: int = 4
    weighted: bool = True

    def __post_init__(self) -> None:
        if self.spare is not None and self.spare < 1:
            raise ValueError(f"razor: spare={self.spare} must be at least 1, or None.")
        if len({len(row) for row in self.heads}) != 1:
            raise ValueError(
                f"razor: heads={self.heads} must be a row of as many key heads for every layer; "
                "take them from choose_heads."
            )
        if isinstance(self.budget, int):
            self.kept(0)

    def kept(self, prompt: int) -> int:
        """Entries of a head that folds, given a prompt of so many tokens; static."""
        share = isinstance(self.budget, float)
        count = max(self.least, int(self.budget * prompt) if share else int(self.budget))
        if count < self.sinks + 2:
            raise ValueError(
                f"razor: a budget of {count} entries must exceed the {self.sinks} sinks by two at "
                "least; raise it, or lower sinks."
            )
        return count

    def split(self, layer: int, depth: int) -> tuple[list[int], list[int]]:
        """The key heads of a layer that keep all, and those that fold."""
        if len(self.heads) != depth:
            raise ValueError(
                f"razor: heads= has rows for {len(self.heads)} layers, and the model has {depth}; "
                "take them from choose_heads on this model."
            )
        row = list(enumerate(self.heads[layer]))
        return [g for g, whole in row if whole], [g for g, whole in row if not whole]

    def held(self, prompt: int, layer: int, depth: int) -> int:
        whole, folding = self.split(layer, depth)
        total = len(whole) * prompt + len(folding) * min(prompt, self.kept(prompt))
        return total // len(self.heads[layer])

    def room(self, prompt: int, length: int, layer: int, depth: int) -> int:
        """The mean over key heads, rounded up."""
        whole, folding = self.split(layer, depth)
        kept = self.kept(prompt)
        more = length - prompt if self.spare is None else self.spare
        slots = len(whole) * length + len(folding) * min(length, kept + more)
        return -(-slots // len(self.heads[layer]))

    def settle(self, cache: LayerCache) -> LayerCache:
        """Of every slot its head, how many entries it stands for (0 for one alone), and its
        weight."""
        if cache.owner is not None:
            return cache
        none = jnp.zeros(cache.position.shape)
        bias = none if self.weighted else None
        return replace(cache, owner=none.astype(jnp.int32), score=none, bias=bias)

    def begin(self, cache: LayerCache, look: Look) -> LayerCache:
        whole, folding = self.split(look.layer, look.depth)
        groups = cache.k.shape[1]
        if groups != len(whole) + len(folding):
            raise ValueError(
                f"razor: heads= has rows of {len(whole) + len(folding)} key heads, and the model "
                f"has {groups}; take them from choose_heads on this model."
            )
        cache = replace(self.settle(cache), owner=None)
        parts = [pool_heads(take_heads(cache, whole), whole)] if whole else []
        if folding:
            parts.append(pool_heads(self._fold_prompt(take_heads(cache, folding)), folding))
        return join_pools(*parts)

    def _fold_prompt(self, cache: LayerCache) -> LayerCache:
        slots = cache.capacity
        k = self.kept(cache.extent.prompt)
        if k >= slots:
            return cache
        map_, weight = fold_middle(cache.length, slots, k, sinks=self.sinks)
        keys, values = map_.apply((cache.k, cache.v))
        place = jnp.where(map_.valid, map_.apply(cache.position, "keep"), -1.0)
        bias = weight if self.weighted else None
        return replace(cache, k=keys, v=values, position=place, score=map_.sizes(), bias=bias)

    def write(self, cache: LayerCache, k: Array, v: Array, position: Array, valid: Any) -> Any:
        return append_to_pool(cache, k, v, position, valid)

    def go_on(self, cache: LayerCache, look: Look) -> LayerCache:
        """Raises ValueError for more tokens at once than there may be free slots."""
        _, folding = self.split(look.layer, look.depth)
        spare = self.spare
        if spare is None or not folding:
            return cache
        limit = self.kept(cache.extent.prompt) + spare
        if limit > cache.extent.length:
            return cache  # it will never be reached
        if look.q.shape[1] > spare:
            raise ValueError(
                f"razor: {look.q.shape[1]} tokens at once find {spare} free slots in a head; give "
                "it fewer, or raise spare."
            )
        mine = cache.valid & jnp.isin(cache.owner, jnp.array(folding))
        full = mine.sum(-1) >= len(folding) * limit
        fold = lambda: self._fold(cache, mine, full, len(folding), spare)  # noqa: E731
        return fold() if spare == 1 else jax.lax.cond(full.any(), fold, lambda: cache)

    def _fold(
        self, cache: LayerCache, mine: Bool[Array, "B 1 C"], full: Array, heads: int, count: int
    ) -> LayerCache:
        """The `count` + 1 first entries behind the sinks in one slot, that of the first, in each of
        the heads: they hold the same positions."""
        first, last = heads * self.sinks, heads * (self.sinks + count + 1)
        _, index = top_k(jnp.where(mine, -cache.position, -jnp.inf), last)
        index = index[..., first:]
        rows = lambda x: gather(x, index, axis=2)  # noqa: E731
        owner, sizes = rows(cache.owner), jnp.maximum(rows(cache.score), 1.0)
        same = owner[..., :heads, None] == owner[..., None, :]
        merge = Mix(same * sizes[..., None, :])
        keys, values = merge.apply((rows(cache.k), rows(cache.v)), "mean")
        # What is out of reach is not written.
        at = jnp.where(full[..., None], index, cache.capacity + jnp.arange(index.shape[-1]))
        store = lambda x, new: put(x, at[..., :heads], new, axis=2)  # noqa: E731
        total = merge.sizes()
        gone = jnp.full(at[..., heads:].shape, -1.0)
        return replace(
            cache,
            k=store(cache.k, keys),
            v=store(cache.v, values),
            score=store(cache.score, total),
            bias=None if cache.bias is None else store(cache.bias, jnp.log(total)),
            position=put(cache.position, at[..., heads:], gone, axis=2),
        )


@register(
    "razor",
    family="evict",
    site="cache",
    paper="RazorAttention 2024",
    needs=("heads",),
    golden=("kv/razor_compress",),
)
def razor(
    layout: Layout,
    *,
    keep: float = 0.2,
    budget: int | None = None,
    heads: tuple[tuple[bool, ...], ...] | None = None,
    least: int = 0,
    sinks: int = 4,
    spare: int | None = 1,
    weighted: bool = True,
) -> Plan:
    """Heads that look far back keep all cache entries, the others fold what lies in the middle.

    keep: share of a prompt's entries in heads that fold; budget: their number instead. heads: of
    `choose_heads`. Other options: see `RazorAttention`. Raises ValueError without heads.
    """
    if heads is None:
        raise ValueError(
            "razor: needs heads=, which key heads keep all; find them with score_heads and "
            "choose_heads."
        )
    how = RazorAttention(heads, budget or keep, least, spare, sinks, weighted)
    return Plan(((Site("cache"), how),), name="razor")
