"""What acts on a cache: the interface, and what it may look at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokred.cache.slots import LayerCache, live
from tokred.plan import Plan, Reduction
from tokred.select import keep_top_k


@dataclass(frozen=True)
class Look:
    """What an eviction may look at beside a layer's cache: the queries that were asked last.

    q: Float[B N H E], at their positions · position: Float[B N], -1 for padding · weigh: attention
    [B H N C] of queries at their positions over the slots of a cache, as this layer computes it
    · rates: of rotary positions, None for a model without · layer, depth: where in the model.
    """

    q: Any
    position: Any
    weigh: Callable[[Array, Array, LayerCache], Array]
    rates: Any = None
    layer: int = 0
    depth: int = 1

    @property
    def newest(self) -> Float[Array, " B"]:
        """The position of each example's last token."""
        return self.position.max(-1)

    def last(self, count: int) -> "Look":
        """The last `count` queries of each example alone, in their order."""
        if count >= self.q.shape[1]:
            return self
        place, valid = self.position, self.position >= 0
        map_ = keep_top_k(place, count, valid=valid, order="position")
        position = jnp.where(live(map_), map_.apply(place), -1.0)
        return replace(self, q=map_.apply(self.q), position=position)

    def probs(self, cache: LayerCache) -> Float[Array, "B H N C"]:
        """Attention of the queries; 0 for padding."""
        there = (self.position >= 0)[:, None, :, None]
        return jnp.where(there, self.weigh(self.q, self.position, cache), 0.0)

    def blocks(self, size: int = 128) -> Iterator["Look"]:
        """The queries, `size` (static) at a time."""
        for start in range(0, self.q.shape[1], size):
            part = slice(start, start + size)
            yield replace(self, q=self.q[:, part], position=self.position[:, part])

    def received(self, cache: LayerCache) -> Float[Array, "B H C"]:
        """The sum of `probs` over all queries, in blocks."""
        total = jnp.zeros((*self.q.shape[:1], self.q.shape[2], cache.capacity))
        for part in self.blocks():
            total = total + part.probs(cache).sum(-2)
        return total


@dataclass(frozen=True)
class CacheReduction(Reduction):
    """Base of what acts at the site 'cache', in every layer alike: all tokens pass, and what is
    stored of them is smaller or read in part. By default everything is stored and read.

    pooled: the slots of all key heads are one pool, see `LayerCache.owner`.
    """

    pooled: ClassVar[bool] = False

    @property
    def raw(self) -> bool:
        """Whether keys are stored before their rotation, see `LayerCache.raw`."""
        return False

    def counts(self, n: int, prefix: int) -> int:
        return n

    def room(self, prompt: int, length: int, layer: int, depth: int) -> int:
        """Slots that a layer needs for a prompt and what follows, `length` in all; static."""
        return length

    def held(self, prompt: int, layer: int, depth: int) -> int:
        """Entries per key head that are left of a prompt; static."""
        return prompt

    def begin(self, cache: LayerCache, look: Look) -> LayerCache:
        """What is kept of a prompt, given the cache of all of it: at most `room` slots."""
        return cache

    def settle(self, cache: LayerCache) -> LayerCache:
        """A cache of the right size with all that this method stores beside its slots."""
        return cache

    def rest(self, whole: LayerCache, look: Look, slots: int) -> LayerCache:
        """What is kept of a prompt, given the cache of all of it, in so many slots."""
        return self.settle(self.begin(whole, look).resize(slots))

    def write(self, cache: LayerCache, k: Array, v: Array, position: Array, valid: Any) -> Any:
        """The cache with more tokens, see `LayerCache.append`."""
        return cache.append(k, v, position, valid)

    def read(self, cache: LayerCache, look: Look) -> LayerCache:
        """What queries look at: all of it, or another cache made of it, whose key heads may be as
        many as those of the queries."""
        return cache

    def go_on(self, cache: LayerCache, look: Look) -> LayerCache:
        """The cache after a step."""
        return cache


PLAIN = CacheReduction()


def cache_reduction(plan: Plan) -> CacheReduction:
    """What acts on the caches of a model, `PLAIN` where nothing does. Raises ValueError where there
    are several, or another reduction stands at that site."""
    found = [reduction for _, reduction in plan.at("cache")]
    fit = [reduction for reduction in found if isinstance(reduction, CacheReduction)]
    if len(found) > 1 or len(fit) < len(found):
        raise ValueError(
            f"Plan {plan.name!r}: one CacheReduction can act on a cache, got "
            f"{[type(reduction).__name__ for reduction in found]}; leave the others out."
        )
    return fit[0] if fit else PLAIN
