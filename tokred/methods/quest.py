"""Quest (Tang et al. 2024): a query reads the pages of the cache that may matter; nothing leaves.

Official code: mit-han-lab/Quest (MIT).
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokred.cache import CacheReduction, LayerCache, Look
from tokred.cache.pages import choose_pages, page_bounds, pages_of, read_pages, score_pages
from tokred.methods.registry import register
from tokred.ops import gather, put
from tokred.ops.attention import per_query_head
from tokred.plan import Layout, Plan, Site


@dataclass(frozen=True)
class Quest(CacheReduction):
    """Every query head reads the max(3, budget // page) pages of `page` entries whose bounds allow
    the greatest product, from layer `dense` on. Bounds of pages are kept with the cache, so that a
    step reads them and the chosen pages alone: time is saved, memory is not.

    budget: entries that are read; a share is of the whole cache. newest: the page that is being
    filled is always among them, as in the released kernels; in the released evaluation it is not,
    and a query may then miss itself and what stands right before it.
    """

    budget: int | float = 0.2
    page: int = 16
    dense: int = 2
    newest: bool = True

    def __post_init__(self) -> None:
        if self.budget <= 0 or self.page < 1:
            raise ValueError(
                f"quest: budget={self.budget} and page={self.page} must be positive; change them."
            )

    def room(self, prompt: int, length: int, layer: int, depth: int) -> int:
        return -(-length // self.page) * self.page

    def settle(self, cache: LayerCache) -> LayerCache:
        bounds = page_bounds(cache.k.astype(jnp.float32), self.page, cache.valid)
        return replace(cache, extra=bounds)

    def write(self, cache: LayerCache, k: Array, v: Array, position: Array, valid: Any) -> Any:
        before, cache = cache.length, cache.append(k, v, position, valid)
        if k.shape[1] > 1:
            return self.settle(cache)
        at = (before // self.page)[..., None]  # the only page that changes
        new = jnp.swapaxes(k, 1, 2).astype(jnp.float32)
        live = (cache.length > before)[..., None, None]
        sides = zip(cache.extra, (jnp.minimum, jnp.maximum), strict=True)
        changed = lambda old, pick: jnp.where(live, pick(old, new), old)  # noqa: E731
        bounds = tuple(
            put(side, at, changed(gather(side, at, axis=2), pick), axis=2) for side, pick in sides
        )
        return replace(cache, extra=bounds)

    def read(self, cache: LayerCache, look: Look) -> LayerCache:
        share = isinstance(self.budget, float)
        budget = int(self.budget * cache.capacity) if share else int(self.budget)
        count = pages_of(budget, self.page, cache.capacity)
        if look.layer < self.dense or count * self.page >= cache.capacity:
            return cache
        if look.q.shape[1] > 1:
            raise ValueError(
                f"quest: {look.q.shape[1]} tokens at once would each read other pages; give it one "
                "at a time behind the prompt."
            )
        chosen = choose_pages(self._scores(cache, look), count)
        fetch = lambda x: read_pages(x, chosen, self.page)  # noqa: E731
        k, v, place = fetch(cache.k), fetch(cache.v), fetch(cache.position[..., None])[..., 0]
        return replace(cache, k=k, v=v, position=place, extra=None)

    def _scores(self, cache: LayerCache, look: Look) -> Float[Array, "B H P"]:
        scores = score_pages(look.q[:, 0], *cache.extra)
        if not self.newest:
            return scores
        filling = per_query_head((cache.length - 1)[..., None] // self.page, scores, axis=-2)
        page = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
        return jnp.where(page == filling, jnp.inf, scores)


@register("quest", family="read", site="cache", paper="Quest 2024", golden=("kv/quest",))
def quest(
    layout: Layout,
    *,
    keep: float = 0.2,
    budget: int | None = None,
    page: int = 16,
    dense: int = 2,
    newest: bool = True,
) -> Plan:
    """Every query reads the pages of the cache that may matter most; nothing leaves.

    keep: share of the cache that is read; budget: number of entries instead. page: entries of one;
    dense: so many layers at the start read all. newest: whether the page being filled always is.
    """
    how = Quest(budget or keep, page=page, dense=dense, newest=newest)
    return Plan(((Site("cache"), how),), name="quest")
