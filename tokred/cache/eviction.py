"""What makes a cache smaller: entries leave after the prompt, and while tokens are generated."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokred.cache.reduction import CacheReduction, Look
from tokred.cache.slots import LayerCache
from tokred.maps import Keep
from tokred.ops import top_k
from tokred.score import mask_scores
from tokred.select import keep_top_k

POSITIONS = ("keep", "renumber", "rerotate")


@dataclass(frozen=True)
class Eviction(CacheReduction):
    """Keeps the entries of a cache that `score` ranks highest; a method defines that alone.

    budget: entries per key head, or, as a float, their share of a prompt. spare: how many entries
    come before the lowest-ranked leave again, as many at a time (above one at the price of asking
    all examples whether it is time); None where none leaves after the prompt is read. sinks,
    recent: how many of the first and the latest entries stay in any case; a float is a share of the
    budget. positions: 'keep' the true distances, or what is left stands without gaps: 'renumber'
    stores keys before their rotation and turns them at every read (StreamingLLM), 'rerotate' turns
    them once, as entries leave (kvpress's key rerotation); up to rounding the same. All static.

    Methods that rank by the queries of a prompt's end rank by the last ones while decoding too:
    `recalled` of them are kept in `extra`.
    """

    budget: int | float = 0.2
    spare: int | None = 1
    sinks: int = 0
    recent: int | float = 0
    positions: str = "keep"

    def __post_init__(self) -> None:
        name = type(self).__name__
        whole = isinstance(self.budget, int)
        if self.budget <= 0 or (not whole and self.budget > 1):
            raise ValueError(
                f"{name}: budget={self.budget} must be a count of entries, or a share in (0, 1] as "
                "a float; change budget."
            )
        if whole:
            self._check_protected(int(self.budget))
        if self.spare is not None and self.spare < 1:
            raise ValueError(f"{name}: spare={self.spare} must be at least 1, or None.")
        if self.positions not in POSITIONS:
            raise ValueError(f"{name}: positions={self.positions!r} must be one of {POSITIONS}.")
        if self.gapless and self.spare is not None and self.dated:
            raise ValueError(
                f"{name}: positions={self.positions!r} would change what earlier queries refer to; "
                "set positions='keep', or spare=None."
            )

    def _check_protected(self, budget: int) -> int:
        """The budget. Raises ValueError where no entry of it could be chosen."""
        sure = self.sinks + self.latest(budget)
        if budget <= sure:
            raise ValueError(
                f"{type(self).__name__}: a budget of {budget} must exceed the {sure} entries that "
                "stay in any case; raise it, or lower sinks or recent."
            )
        return budget

    def latest(self, budget: int) -> int:
        """How many of the latest entries stay."""
        return int(self.recent * budget) if isinstance(self.recent, float) else self.recent

    @property
    def raw(self) -> bool:
        return self.positions == "renumber"

    @property
    def gapless(self) -> bool:
        """Whether entries move to positions without gaps."""
        return self.positions != "keep"

    @property
    def recalled(self) -> int:
        """How many of the last queries `score` looks at while decoding, earlier ones among them; 0
        for those of the step alone."""
        return 0

    @property
    def dated(self) -> bool:
        """Whether `score` needs true positions while decoding."""
        return self.recalled > 0

    @property
    def ordered(self) -> bool:
        """Whether `score` reads the slots in the order of the text: then entries that stay move up
        as others leave."""
        return False

    def kept(self, prompt: int, layer: int, depth: int) -> int:
        """Entries per key head that a layer may hold, given a prompt of so many tokens; static."""
        share = isinstance(self.budget, float)
        return self._check_protected(int(self.budget * prompt)) if share else int(self.budget)

    def held(self, prompt: int, layer: int, depth: int) -> int:
        return min(prompt, self.kept(prompt, layer, depth))

    def room(self, prompt: int, length: int, layer: int, depth: int) -> int:
        if self.spare is None:
            return self.held(prompt, layer, depth) + length - prompt
        return self.kept(prompt, layer, depth) + self.spare

    def score(self, cache: LayerCache, look: Look) -> Float[Array, "B G C"]:
        """What each entry is worth, +inf for those that stay; of empty slots it does not matter."""
        raise NotImplementedError

    def observe(self, cache: LayerCache, look: Look) -> LayerCache:
        """What is gathered at every step, such as attention received, in `cache.score`."""
        return cache

    def settle(self, cache: LayerCache) -> LayerCache:
        return replace(cache, gapless=self.gapless)

    def begin(self, cache: LayerCache, look: Look) -> LayerCache:
        cache = self.observe(cache, look)
        k = self.held(cache.capacity, look.layer, look.depth)
        worth = self._protect(cache, look, k)
        cache, _ = self._recall(cache, look)
        cache = cache.keep(keep_top_k(worth, k, valid=cache.valid, order="position"))
        return cache.renumber(look.rates) if self.gapless else cache

    def go_on(self, cache: LayerCache, look: Look) -> LayerCache:
        """The cache after a step: where no slot is free, the `spare` least worthy leave.

        Raises ValueError for more tokens at once than there may be free slots.
        """
        cache = self.observe(cache, look)
        spare = self.spare
        if spare is None:
            return cache
        if look.q.shape[1] > spare:
            raise ValueError(
                f"{type(self).__name__}: {look.q.shape[1]} tokens at once find {spare} free slots "
                "in a cache; give it fewer, or raise spare."
            )
        cache, look = self._recall(cache, look)
        full = cache.length == cache.capacity

        def evict() -> LayerCache:
            worth = self._protect(cache, look, cache.capacity - spare)
            left = (_move_up if self.ordered else _drop)(cache, worth, spare, full)
            return left.renumber(look.rates, full) if self.gapless else left

        return evict() if spare == 1 else jax.lax.cond(full.any(), evict, lambda: cache)

    def _recall(self, cache: LayerCache, look: Look) -> tuple[LayerCache, Look]:
        """(the cache with the last `recalled` queries, a look at these), as far as they are of use
        while decoding."""
        count = self.recalled
        if not count or self.spare is None:
            return cache, look
        batch, _, *head = look.q.shape
        none = jnp.zeros((batch, count, *head), look.q.dtype), jnp.full((batch, count), -1.0)
        both = zip(cache.extra or none, (look.q, look.position), strict=True)
        q, position = (jnp.concatenate(x, axis=1) for x in both)
        last = replace(look, q=q, position=position).last(count)
        return replace(cache, extra=(last.q, last.position)), last

    def _protect(self, cache: LayerCache, look: Look, budget: int) -> Float[Array, "B G C"]:
        """Scores with +inf for what stays in any case; empty slots are of no use."""
        latest = look.newest[:, None, None] - self.latest(budget)
        stays = (cache.position < self.sinks) | (cache.position > latest)
        worth = jnp.where(stays, jnp.inf, self.score(cache.placed(look.rates), look))
        return jnp.where(cache.valid, worth, jnp.inf)


def _drop(cache: LayerCache, worth: Array, count: int, full: Array) -> LayerCache:
    """Without the `count` lowest of the rows that are full; nothing moves."""
    gone = _lowest(mask_scores(worth), count) & full[..., None] & ~jnp.isposinf(worth)
    return cache.drop(gone)


def _move_up(cache: LayerCache, worth: Array, count: int, full: Array) -> LayerCache:
    """The same, and what stays takes the first slots in its old order."""
    slots = cache.capacity
    limit = jnp.where(full, slots - count, slots)
    how = {"valid": cache.valid, "order": "position", "limit": limit}
    return cache.keep(keep_top_k(worth, slots, **how))


def _lowest(scores: Float[Array, "B G C"], count: int) -> Bool[Array, "B G C"]:
    """Which are the `count` lowest of their row."""
    slots = jnp.arange(scores.shape[-1])[None, None]
    if count == 1:
        return slots == scores.argmin(-1, keepdims=True)
    _, index = top_k(-scores, count)
    return Keep(index, scores.shape[-1]).source >= 0
