"""Selection: scores or features to a TokenMap. Counts are Python ints.

All functions protect the first `prefix` tokens, which stay in front in their order, take `valid`,
and stop the gradient: it flows through what a map moves, never through the choice.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokred.maps import Assign, Keep
from tokred.ops import gather, segment_sum, top_k
from tokred.ops.gather import aligned
from tokred.score import cosine, mask_scores

PROTECTED = -jnp.inf
ABSENT = -1e30  # an invalid token: leaves before any protected one, after every real match


def _check_range(what: str, name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(
            f"{what}: {name}={value} must lie in [{low}, {high}], as tokens and prefix allow; "
            f"change {name}."
        )


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
    _check_range("keep_top_k", "k", k, 1, n - prefix)
    if order not in ("score", "position"):
        raise ValueError(f"keep_top_k: order={order!r} must be 'score' or 'position'.")
    scores = mask_scores(scores, valid)[..., prefix:]
    best, index = top_k(scores, k)
    index = index + prefix
    if valid is None and limit is None:
        index = jnp.sort(index, axis=-1) if order == "position" else index
        return _with_prefix(index, prefix, n, None)
    alive = ~jnp.isneginf(best)
    if limit is not None:
        alive &= _row(jnp.arange(k), alive.ndim) < limit[..., None]
    if order == "position":
        index = jnp.sort(jnp.where(alive, index, index + n), axis=-1)
        alive, index = index < n, index % n
    return _with_prefix(index, prefix, n, valid, alive)


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
    index: Array, prefix: int, n: int, valid: Array | None, alive: Array | None = None
) -> Keep:
    front = _rows(range(prefix), index.shape[:-1])
    index = jnp.concatenate([front, index.astype(jnp.int32)], axis=-1)
    kept = None if valid is None else gather(valid, index, axis=valid.ndim - 1)
    if alive is not None:
        alive = jnp.concatenate([jnp.ones(front.shape, bool), alive], axis=-1)
        kept = alive if kept is None else kept & alive
    return Keep(index, n, kept)


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
    always = _row(jnp.arange(prefix + capacity) <= prefix, scores.ndim)
    fits = chosen | always
    alive = fits if map_.valid is None else fits & map_.valid
    return Keep(map_.index, map_.n, alive), jnp.maximum(passed - capacity, 0)


def rank_tokens(
    scores: Float[Array, "*B N"], *, prefix: int = 0, valid: Bool[Array, "*B N"] | None = None
) -> Keep:
    """All tokens by descending score, the prefix first: a permutation."""
    return keep_top_k(scores, scores.shape[-1] - prefix, prefix=prefix, valid=valid)


def keep_static(index: Sequence[int], n: int, batch: tuple[int, ...], *, prefix: int = 0) -> Keep:
    """The prefix and the same `index` (counted from the first token) for every example."""
    return _with_prefix(_rows(index, batch), prefix, n, None)


def _rows(index: Sequence[int] | np.ndarray, batch: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(jnp.asarray(index, jnp.int32), (*batch, len(index)))


def _row(a: Array, ndim: int) -> Array:
    """[N] with leading unit axes: rank promotion stays explicit."""
    return aligned(a, ndim, ndim - 1)


def grid_cells(grid: tuple[int, int], cells: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A grid cut into near-equal cells: (cell of every raster position, centre of every cell).

    Static. Raises ValueError where a side has fewer positions than cells.
    """
    (h, w), (a, b) = grid, cells
    if not (0 < a <= h and 0 < b <= w):
        raise ValueError(f"grid_cells: cells={cells} must lie within grid={grid}; use fewer cells.")
    rows, cols = np.arange(h) * a // h, np.arange(w) * b // w
    middle = lambda ids, count: np.array([np.flatnonzero(ids == i).mean() for i in range(count)])  # noqa: E731
    centre = np.floor(middle(rows, a))[:, None] * w + np.floor(middle(cols, b))[None]
    return (rows[:, None] * b + cols[None]).reshape(-1), centre.reshape(-1).astype(np.int32)


def pool_cells(
    grid: tuple[int, int], cells: tuple[int, int], batch: tuple[int, ...], *, prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> Assign:  # fmt: skip
    """Average pooling: every grid cell becomes one token, its centre the representative."""
    target, centre = grid_cells(grid, cells)
    front = np.arange(prefix)
    target = _rows(np.concatenate([front, target + prefix]), batch)
    index = _rows(np.concatenate([front, centre + prefix]), batch)
    return merge_into(target, prefix + cells[0] * cells[1], index, valid)


def merge_into(target: Array, k: int, index: Array, valid: Array | None) -> Assign:
    """An Assign whose invalid members go to nobody; a group is valid if any member is."""
    if valid is None:
        return Assign(target, k, index=index)
    map_ = Assign(jnp.where(valid, target, k), k, index=index)
    return dataclasses.replace(map_, valid=map_.apply(valid, "max"))


def match_bipartite(
    metric: Float[Array, "*B N E"],
    r: int,
    *,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> Assign:
    """ToMe: `r` tokens at even positions merge into their most similar ones at odd positions.

    r is clipped to (N - prefix) // 2. Output order: prefix, unmerged even tokens (ascending; by
    descending similarity if prefix is 0), odd tokens. Cosine similarity in float32.
    Source: Bolya et al. 2023, facebookresearch/ToMe `bipartite_soft_matching`.
    """
    n = metric.shape[-2]
    _check_range("match_bipartite", "r", r, 0, n)
    r = min(r, (n - prefix) // 2)
    even, odd = np.arange(0, n, 2), np.arange(1, n, 2)
    metric = jax.lax.stop_gradient(metric)
    similar = cosine(metric[..., even, :], metric[..., odd, :])
    similar = _hide(similar, even, odd, prefix, valid)
    best, partner = similar.max(-1), similar.argmax(-1)
    edges = top_k(best, best.shape[-1])[1]  # all even tokens, most similar first
    source, unmerged = edges[..., :r], edges[..., r:]
    if prefix:
        unmerged = jnp.sort(unmerged, axis=-1)
    # The prefix in front: its even members lead `unmerged`, its odd ones `odd`.
    batch, first, second = best.shape[:-1], (prefix + 1) // 2, prefix // 2
    rest = [unmerged[..., first:] * 2, _rows(odd[second:], batch)]
    stay = jnp.concatenate([_rows(range(prefix), batch), *rest], -1)
    slot = gather(partner, source, axis=len(batch)) + prefix + len(even) - r - first - second
    return _merge_pairs(source * 2, slot, stay, n, valid)


def _hide(similar: Array, a: np.ndarray, b: np.ndarray, prefix: int, valid: Array | None) -> Array:
    """Scores of pairs (a, b) with absent tokens last and protected ones impossible."""
    if valid is not None:
        both = valid[..., a][..., :, None] & valid[..., b][..., None, :]
        # A valid token may move to an absent slot (nothing is lost), an absent one anywhere.
        similar = jnp.where(both, similar, ABSENT * jnp.where(valid[..., a], 2.0, 1.0)[..., None])
    protected = (a < prefix)[:, None] | (b < prefix)[None, :]
    protected = protected.reshape((1,) * (similar.ndim - 2) + protected.shape)
    return jnp.where(protected, PROTECTED, similar)


def _merge_pairs(source: Array, slot: Array, stay: Array, n: int, valid: Array | None) -> Assign:
    """Tokens `source` [*B r] join output `slot` [*B r]; `stay` [*B K] are the outputs' own
    tokens in order; a token in neither is dropped."""
    k, batch = stay.shape[-1], stay.shape[:-1]
    goes = jnp.concatenate([_rows(range(k), batch), slot.astype(jnp.int32)], -1) - k
    index = jnp.concatenate([stay, source], -1)
    return merge_into(segment_sum(goes, index, n, axis=len(batch)) + k, k, stay, valid)


def match_kth(
    metric: Float[Array, "*B N E"],
    every: int,
    *,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> Assign:
    """ToMe's k-th variant: of each `every` consecutive tokens the last stays, the others merge
    into the most similar one that stays; the (N - prefix) mod `every` trailing tokens vanish.

    Source: facebookresearch/ToMe `kth_bipartite_soft_matching`.
    """
    n = metric.shape[-2]
    _check_range("match_kth", "every", every, 1, n - prefix)
    full = (n - prefix) // every * every
    body = np.arange(prefix, prefix + full).reshape(-1, every)
    leave, last = body[:, :-1].reshape(-1), body[:, -1]
    metric = jax.lax.stop_gradient(metric)
    similar = cosine(metric[..., leave, :], metric[..., last, :])
    partner = _hide(similar, leave, last, prefix, valid).argmax(-1)
    batch = metric.shape[:-2]
    stay = _rows(np.concatenate([np.arange(prefix), last]), batch)
    return _merge_pairs(_rows(leave, batch), partner + prefix, stay, n, valid)


def match_random(
    metric: Float[Array, "*B N E"],
    r: int,
    draws: Float[Array, "*B N"],
    *,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> Assign:
    """ToMe's random variant: the `r` tokens with the smallest `draws` merge into the most similar
    of the rest, which keep the order of their draws.

    Source: facebookresearch/ToMe `random_bipartite_soft_matching`.
    """
    n = metric.shape[-2]
    _check_range("match_random", "r", r, 0, n - prefix - 1)
    alive = jnp.ones(draws.shape, bool) if valid is None else valid
    # Absent tokens stay, so that r real ones merge; protected ones stay even before them.
    draws = jnp.where(alive, draws, jnp.finfo(draws.dtype).max)
    draws = jnp.where(_row(jnp.arange(n) < prefix, draws.ndim), jnp.inf, draws)
    order = jnp.argsort(draws, axis=-1, stable=True).astype(jnp.int32)
    # The prefix, drawn last, goes in front.
    source, stay = order[..., :r], jnp.roll(order[..., r:], prefix, axis=-1)
    metric = jax.lax.stop_gradient(metric)
    axis = metric.ndim - 2
    rows = lambda index: gather(metric, index, axis=axis)  # noqa: E731
    similar = cosine(rows(source), rows(stay))
    absent = ~gather(alive, stay, axis=axis)
    similar = jnp.where(absent[..., None, :], ABSENT, similar)
    similar = jnp.where((stay < prefix)[..., None, :], PROTECTED, similar)
    return _merge_pairs(source, similar.argmax(-1), stay, n, valid)


def merge_to_nearest(
    x: Float[Array, "*B N D"],
    k: int,
    *,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> tuple[Assign, Float[Array, "*B N"]]:
    """Tokens sorted by importance: those from slot `k` on join the most similar of the first `k`.

    Returns the map and, per token, the best cosine similarity (1 for the tokens that stay).
    k counts the prefix. Source: Chen et al. 2023, OpenGVLab/DiffRate `get_merge_func`.
    """
    n = x.shape[-2]
    _check_range("merge_to_nearest", "k", k, prefix + 1, n)
    best, partner = nearest_kept(x, k, prefix=prefix, valid=valid)
    index = _rows(range(k), x.shape[:-2])
    map_ = merge_into(jnp.concatenate([index, partner], -1), k, index, valid)
    return map_, jnp.concatenate([jnp.ones(index.shape, best.dtype), best], -1)


def nearest_kept(
    x: Float[Array, "*B N D"], k: int | Array, *, prefix: int = 0, valid: Array | None = None
) -> tuple[Float[Array, "*B M"], Array]:
    """Best cosine similarity to the slots [prefix, k), and which slot it is.

    For the M = N - k tokens from slot k on; with a traced `k` (the soft twin) for all M = N.
    """
    x = jax.lax.stop_gradient(x)
    static = isinstance(k, int)
    tail, among = (x[..., k:, :], x[..., :k, :]) if static else (x, x)
    similar = cosine(tail, among)
    slot = jnp.arange(among.shape[-2])
    allowed = _row((slot >= prefix) & (slot < k), similar.ndim)
    if valid is not None:
        late = valid[..., k:] if static else valid
        allowed = allowed & late[..., :, None] & valid[..., None, : among.shape[-2]]
    similar = jnp.where(allowed, similar, PROTECTED)
    best, partner = similar.max(-1), similar.argmax(-1).astype(jnp.int32)
    if valid is None:
        return best, partner
    # Nowhere to go: the first kept slot takes the token in.
    nowhere = jnp.isneginf(best)
    return jnp.where(nowhere, 0.0, best), jnp.where(nowhere, prefix, partner)
