"""Which heads look far back: echo and induction heads, found on a random text that repeats."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from tokred.cache.reduction import CacheReduction, Look
from tokred.cache.slots import LayerCache
from tokred.maps import Keep
from tokred.plan import Plan, Site

Table = tuple[tuple[bool, ...], ...]


class HeadScores(NamedTuple):
    """Attention in [0, 1] of each layer's query heads, mean over queries: echo to earlier copies of
    a query's own token, induction to the tokens that followed these."""

    echo: Float[Array, "L H"]
    induction: Float[Array, "L H"]


def score_heads(
    model: Any, *, key: PRNGKeyArray, length: int = 2500, copies: int = 4, batch: int = 1
) -> HeadScores:
    """How much each head repeats, in one pass over `length` random tokens, `copies` times.

    model: anything that has `config.vocab`, `make_cache` and `extend` as a `Decoder` has. Jit it;
    static: length, copies, batch. Of the attention only `Look.blocks` are held at a time.

    Raises:
      ValueError: fewer than two tokens or copies, or more tokens than the model's context.
    """
    if length < 2 or copies < 2:
        raise ValueError(
            f"score_heads: length={length} and copies={copies} must be at least 2, since heads are "
            "told by what they repeat; raise them."
        )
    once = jax.random.randint(key, (batch, length), 0, model.config.vocab)
    ids, plan = jnp.tile(once, (1, copies)), Plan(((Site("cache"), _Search(length)),))
    cache = model.make_cache(batch, ids.shape[1], plan=plan)
    _, cache, _ = model.extend(ids, cache, plan=plan, fresh=True)
    told = (layer.extra for layer in cache.layers)
    return HeadScores(*(jnp.stack(x).mean(1) for x in zip(*told, strict=True)))


@dataclass(frozen=True)
class _Search(CacheReduction):
    """Keeps nothing of a text with this period but its heads' scores."""

    period: int

    def room(self, prompt: int, length: int, layer: int, depth: int) -> int:
        return 1

    def begin(self, cache: LayerCache, look: Look) -> LayerCache:
        parts = [self._sums(cache, part) for part in look.blocks()]
        asked = (look.position >= self.period).sum(-1, keepdims=True)
        totals = (sum(sums) for sums in zip(*parts, strict=True))
        scores = tuple(total / jnp.maximum(asked, 1) for total in totals)
        none = jnp.zeros((*cache.position.shape[:2], 0), jnp.int32)
        return replace(cache.keep(Keep(none, cache.capacity)), extra=scores)

    def _sums(self, cache: LayerCache, look: Look) -> tuple[Array, Array]:
        """Attention [B H] to copies and to what followed them, of queries that have a copy."""
        key = cache.position[:, :1]
        gap = look.position[..., None] - key  # [B N C]
        copy = (gap % self.period == 0) & (gap > 0)
        follows = ((gap + 1) % self.period == 0) & (key > 0)  # nothing came before the first key
        again = look.position >= self.period
        probs = jnp.where(again[:, None, :, None], look.probs(cache), 0.0)
        on = lambda chosen: jnp.where(chosen[:, None], probs, 0.0).sum((-2, -1))  # noqa: E731
        return on(copy), on(follows)


def choose_heads(
    scores: HeadScores, groups: int, *, echo: float = 0.01, induction: float = 0.14
) -> Table:
    """RazorAttention (Tang et al. 2024): for every layer, which of its `groups` key heads look far
    back: of those of all layers together the share `echo` and the share `induction` with the
    highest scores, rounded up. A key head has the best score of its query heads. Scores must be
    known numbers.

    Raises:
      ValueError: query heads that are no multiple of groups.
    """
    depth, heads = scores.echo.shape
    if heads % groups:
        raise ValueError(
            f"choose_heads: {heads} query heads do not share {groups} key heads; give it the "
            "model's number of key heads."
        )
    chosen = np.zeros(depth * groups, bool)
    for told, share in ((scores.echo, echo), (scores.induction, induction)):
        best = np.asarray(told).reshape(depth * groups, -1).max(-1)
        count = math.ceil(round(share * best.size, 6))
        chosen[np.argsort(-best, kind="stable")[:count]] = True
    return tuple(tuple(row) for row in chosen.reshape(depth, groups).tolist())
