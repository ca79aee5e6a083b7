"""Matching: which tokens merge into which, by their similarity."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokred.maps import Assign
from tokred.ops import gather, put, segment_sum, top_k
from tokred.score import cosine
from tokred.select.group import merge_into
from tokred.select.rows import check_range, leading_row, static_rows

NEVER = -jnp.inf
ABSENT = -1e30  # a pair with an absent token: after every real match


def match_sets(
    similar: Float[Array, "*B A C"],
    a: Int[Array, "*B A"] | np.ndarray,
    b: Int[Array, "*B C"] | np.ndarray,
    r: int,
    n: int,
    *,
    front: Int[Array, "*B P"] | np.ndarray | Sequence[int] = (),
    back: int = 0,
    ordered: bool = False,
    valid: Bool[Array, "*B N"] | None = None,
) -> Assign:
    """`r` of the tokens `a` merge into the most similar of the tokens `b`, the closest pairs first;
    then `back` of `b`, with what they took in, into the most similar of what is left of `a`.

    similar: of every a with every b. a, b, front: distinct tokens of `n`, the same for all examples
    where they have no batch axes; a token in none of them is dropped. Absent tokens leave last.
    Output order: front, what stays of a by descending similarity to its best b (ordered: as given),
    what stays of b (as given; after moving back by descending similarity).
    Static: r, n, back, ordered. Gradient: none.

    Raises:
      ValueError: more than `a` or `b` hold, or nothing is left of `a` to move back to.
    """
    batch, (rows, columns) = similar.shape[:-2], similar.shape[-2:]
    check_range("match_sets", "r", r, 0, rows - (back > 0) if columns else 0)
    check_range("match_sets", "back", back, 0, columns)
    spread = lambda index: static_rows(index, batch) if np.ndim(index) < 2 else index  # noqa: E731
    front, a, b = spread(front), spread(a), spread(b)
    if not (rows and columns):
        return _join([], jnp.concatenate([front, a, b], -1), n, valid)
    pick = lambda of, index: gather(of, index, axis=len(batch))  # noqa: E731
    leave, into, rest = _closest(similar, r, a, b, valid)
    rest = jnp.sort(rest, axis=-1) if ordered else rest
    pairs = [(pick(a, leave), pick(b, into))]
    a = pick(a, rest)
    if back:
        turned = jnp.swapaxes(pick(similar, rest), -1, -2)
        leave, into, rest = _closest(turned, back, b, a, valid)
        pairs.append((pick(b, leave), pick(a, into)))
        b = pick(b, rest)
    return _join(pairs, jnp.concatenate([front, a, b], -1), n, valid)


def _closest(
    similar: Array, r: int, a: Array, b: Array, valid: Array | None
) -> tuple[Array, Array, Array]:
    """(r rows with the highest maxima, where each has it, the other rows), descending."""
    similar, axis = jax.lax.stop_gradient(similar), a.ndim - 1
    if valid is not None:
        here, there = gather(valid, a, axis=axis)[..., None], gather(valid, b, axis=axis)
        # A present token may move to an absent slot (nothing is lost), an absent one anywhere.
        lowest = ABSENT * jnp.where(here, 2.0, 1.0)
        similar = jnp.where(here & there[..., None, :], similar, lowest)
    order = top_k(similar.max(-1), similar.shape[-2])[1]
    leave = order[..., :r]
    return leave, gather(similar.argmax(-1), leave, axis=axis), order[..., r:]


def _join(pairs: Sequence[tuple[Array, Array]], stay: Array, n: int, valid: Array | None) -> Assign:
    """Tokens `stay` [*B K] are the outputs' own, in order. Of each (tokens, tokens [*B r]), one
    after the other, the first join the second, wherever those go in turn."""
    k, axis = stay.shape[-1], stay.ndim - 1
    slots = static_rows(range(k), stay.shape[:-1])
    where = segment_sum(slots - k, stay, n, axis=axis) + k
    for source, into in reversed(pairs):
        where = put(where, source, gather(where, into, axis=axis), axis=axis)
    joining = jnp.concatenate([source for source, _ in pairs], -1) if pairs else None
    return merge_into(where, k, stay, valid, joining)


def alternate(n: int, prefix: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Even and odd positions of `n` tokens behind the prefix: ToMe's two sets. Static."""
    every = np.arange(prefix, n)
    return every[every % 2 == 0], every[every % 2 == 1]


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
    check_range("match_bipartite", "r", r, 0, n)
    r, (a, b) = min(r, (n - prefix) // 2), alternate(n, prefix)
    similar = cosine(metric[..., a, :], metric[..., b, :])
    front = range(prefix)
    return match_sets(similar, a, b, r, n, front=front, ordered=prefix > 0, valid=valid)


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
    check_range("match_kth", "every", every, 1, n - prefix)
    full = (n - prefix) // every * every
    body = np.arange(prefix, prefix + full).reshape(-1, every)
    leave, last = body[:, :-1].reshape(-1), body[:, -1]
    similar = cosine(metric[..., leave, :], metric[..., last, :])
    return match_sets(similar, leave, last, len(leave), n, front=range(prefix), valid=valid)


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
    n, axis = metric.shape[-2], metric.ndim - 2
    check_range("match_random", "r", r, 0, n - prefix - 1)
    # Absent tokens stay, so that r real ones merge.
    draws = draws if valid is None else jnp.where(valid, draws, jnp.finfo(draws.dtype).max)
    order = jnp.argsort(draws[..., prefix:], axis=-1, stable=True).astype(jnp.int32) + prefix
    source, stay = order[..., :r], order[..., r:]
    similar = cosine(gather(metric, source, axis=axis), gather(metric, stay, axis=axis))
    return match_sets(similar, source, stay, r, n, front=range(prefix), valid=valid)


def match_cells(
    metric: Float[Array, "*B N E"],
    r: int,
    grid: tuple[int, int],
    cell: tuple[int, int] = (2, 2),
    *,
    draws: Float[Array, " M"] | None = None,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> Assign:
    """ToMe for Stable Diffusion: of each whole cell of the grid one token stays, its first or
    that with the smallest of `draws`; `r` of the others merge into the most similar.

    r is clipped to the number of others. draws: of the M tokens behind the prefix, the same for all
    examples. Output order: prefix, unmerged others by descending similarity, one of each cell.
    Source: Bolya and Hoffman 2023, dbolya/tomesd `bipartite_soft_matching_random2d`.
    """
    *batch, n, _ = metric.shape
    check_range("match_cells", "r", r, 0, n)
    rows = lambda index: jnp.broadcast_to(index + prefix, (*batch, len(index)))  # noqa: E731
    b, a = map(rows, _of_cells(grid, cell, draws))
    of = lambda index: gather(metric, index, axis=len(batch))  # noqa: E731
    r = min(r, a.shape[-1]) if b.shape[-1] else 0
    return match_sets(cosine(of(a), of(b)), a, b, r, n, front=range(prefix), valid=valid)


def _of_cells(
    grid: tuple[int, int], cell: tuple[int, int], draws: Array | None
) -> tuple[Int[Array, " K"] | np.ndarray, Int[Array, " R"] | np.ndarray]:
    """(one token of each whole cell, all others)."""
    (down, along), index = cell, np.arange(grid[0] * grid[1])
    whole = index.reshape(grid)[: grid[0] // down * down, : grid[1] // along * along]
    cells = whole.reshape(grid[0] // down, down, grid[1] // along, along).swapaxes(1, 2)
    cells = cells.reshape(-1, down * along)
    if draws is None:
        return cells[:, 0], np.setdiff1d(index, cells[:, 0])
    lowest = jnp.argmin(draws[cells], axis=-1)
    stay = jnp.take_along_axis(jnp.asarray(cells), lowest[:, None], axis=-1)[:, 0]
    there = jnp.zeros(len(index), bool).at[stay].set(True)
    return stay, jnp.argsort(there, stable=True)[: len(index) - len(cells)]


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
    check_range("merge_to_nearest", "k", k, prefix + 1, n)
    best, partner = nearest_kept(x, k, prefix=prefix, valid=valid)
    index = static_rows(range(k), x.shape[:-2])
    target, tail = jnp.concatenate([index, partner], -1), static_rows(range(k, n), x.shape[:-2])
    map_ = merge_into(target, k, index, valid, tail)
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
    allowed = leading_row((slot >= prefix) & (slot < k), similar.ndim)
    if valid is not None:
        late = valid[..., k:] if static else valid
        allowed = allowed & late[..., :, None] & valid[..., None, : among.shape[-2]]
    similar = jnp.where(allowed, similar, NEVER)
    best, partner = similar.max(-1), similar.argmax(-1).astype(jnp.int32)
    if valid is None:
        return best, partner
    # Nowhere to go: the first kept slot takes the token in.
    nowhere = jnp.isneginf(best)
    return jnp.where(nowhere, 0.0, best), jnp.where(nowhere, prefix, partner)
