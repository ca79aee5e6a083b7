"""Which tokens stay: scores to a Keep."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.maps import Assign, Keep
from tokred.ops import gather, top_k
from tokred.score import mask_scores
from tokred.select.rows import check_range, leading_row, static_rows


def keep_top_k(
    scores: Float[Array, "*B N"],
    k: int,
    *,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
    order: str = "score",
    limit: Int[Array, "*B"] | None = None,
) -> Keep:
    """The prefix and the `k` best of the rest, by descending score or in their old order.

    order: 'score' | 'position'. limit: how many of the k slots each example uses, None for all.
    Surplus slots, and those without a valid token, are invalid; by position they come last.
    """
    n = scores.shape[-1]
    check_range("keep_top_k", "k", k, 1, n - prefix)
    if order not in ("score", "position"):
        raise ValueError(f"keep_top_k: order={order!r} must be 'score' or 'position'.")
    scores = mask_scores(scores, valid)[..., prefix:]
    best, index = top_k(scores, k)
    index = index + prefix
    if valid is None and limit is None:
        index = jnp.sort(index, axis=-1) if order == "position" else index
        return _with_prefix(index, prefix, n, None, ordered=order == "position")
    alive = ~jnp.isneginf(best)
    if limit is not None:
        alive &= leading_row(jnp.arange(k), alive.ndim) < limit[..., None]
    if order == "position":
        index = jnp.sort(jnp.where(alive, index, index + n), axis=-1)
        alive, index = index < n, index % n
    return _with_prefix(index, prefix, n, valid, alive, order == "position")


def keep_where(
    chosen: Bool[Array, "*B N"],
    k: int,
    *,
    scores: Float[Array, "*B N"] | None = None,
    valid: Bool[Array, "*B N"] | None = None,
) -> tuple[Keep, Int[Array, "*B"]]:
    """The `chosen` tokens in their old order, in k slots: (map, overflow [*B]).

    Of more than k chosen ones the best by `scores` fit, the first without scores; overflow counts
    the others.
    """
    alive = chosen if valid is None else chosen & valid
    rank = jnp.zeros(alive.shape) if scores is None else scores
    count = alive.sum(-1)
    map_ = keep_top_k(rank, k, valid=alive, order="position")
    return map_, jnp.maximum(count - k, 0)


def rank_within(scores: Float[Array, "*B N"], group: Int[Array, "*B N"]) -> Int[Array, "*B N"]:
    """Each token's rank by descending score among those of its group; ties in their old order."""
    axis = scores.ndim - 1
    slots = jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    low = -mask_scores(scores)
    groups, _, order = jax.lax.sort((group.astype(jnp.int32), low, slots), num_keys=2)
    first = jnp.concatenate(
        [jnp.ones((*groups.shape[:-1], 1), bool), groups[..., 1:] != groups[..., :-1]], -1
    )
    start = jax.lax.cummax(jnp.where(first, slots, 0), axis=axis)
    back = jax.lax.sort((order, slots - start), num_keys=1)  # the inverse permutation
    return back[1]


def _with_prefix(
    index: Array, prefix: int, n: int, valid: Array | None, alive: Array | None = None,
    ordered: bool = False,
) -> Keep:  # fmt: skip
    front = static_rows(range(prefix), index.shape[:-1])
    index = jnp.concatenate([front, index.astype(jnp.int32)], axis=-1)
    kept = None if valid is None else gather(valid, index, axis=valid.ndim - 1)
    if alive is not None:
        alive = jnp.concatenate([jnp.ones(front.shape, bool), alive], axis=-1)
        kept = alive if kept is None else kept & alive
    return Keep(index, n, kept, ordered)


def keep_above(
    scores: Float[Array, "*B N"],
    threshold: float,
    capacity: int,
    *,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> tuple[Keep, Array]:
    """Tokens with score > threshold, at most `capacity` of them (the best), at least one.

    A data-dependent count in static slots: returns (Keep with `valid`, overflow [*B] = how many
    passed the threshold and found no slot).
    """
    map_ = keep_top_k(scores, capacity, prefix=prefix, valid=valid)
    scores = mask_scores(scores, valid)
    passed = (scores > threshold)[..., prefix:].sum(-1)
    chosen = gather(scores, map_.index, axis=scores.ndim - 1) > threshold
    always = leading_row(jnp.arange(prefix + capacity) <= prefix, scores.ndim)
    fits = chosen | always
    alive = fits if map_.valid is None else fits & map_.valid
    return Keep(map_.index, map_.n, alive), jnp.maximum(passed - capacity, 0)


def rank_tokens(
    scores: Float[Array, "*B N"], *, prefix: int = 0, valid: Bool[Array, "*B N"] | None = None
) -> Keep:
    """All tokens by descending score, the prefix first: a permutation."""
    return keep_top_k(scores, scores.shape[-1] - prefix, prefix=prefix, valid=valid)


def keep_representatives(map_: Assign) -> Keep:
    """The tokens that stand for the groups of a merge, the other members dropped."""
    axis = map_.target.ndim - 1
    valid = None if map_.valid is None else gather(map_.target, map_.index, axis=axis) < map_.k
    return Keep(map_.index, map_.n, valid)


def keep_static(index: Sequence[int], n: int, batch: tuple[int, ...], *, prefix: int = 0) -> Keep:
    """The prefix and the same `index` (counted from the first token) for every example."""
    return _with_prefix(static_rows(index, batch), prefix, n, None)
