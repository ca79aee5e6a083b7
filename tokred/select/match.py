"""Matching: which tokens merge into which, by the similarity of their features."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tokred.maps import Assign
from tokred.ops import gather, segment_sum, top_k
from tokred.score import cosine
from tokred.select.group import merge_into
from tokred.select.rows import check_range, leading_row, static_rows

PROTECTED = -jnp.inf
ABSENT = -1e30  # an invalid token: leaves before any protected one, after every real match


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
    rest = [unmerged[..., first:] * 2, static_rows(odd[second:], batch)]
    stay = jnp.concatenate([static_rows(range(prefix), batch), *rest], -1)
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
    goes = jnp.concatenate([static_rows(range(k), batch), slot.astype(jnp.int32)], -1) - k
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
    check_range("match_kth", "every", every, 1, n - prefix)
    full = (n - prefix) // every * every
    body = np.arange(prefix, prefix + full).reshape(-1, every)
    leave, last = body[:, :-1].reshape(-1), body[:, -1]
    metric = jax.lax.stop_gradient(metric)
    similar = cosine(metric[..., leave, :], metric[..., last, :])
    partner = _hide(similar, leave, last, prefix, valid).argmax(-1)
    batch = metric.shape[:-2]
    stay = static_rows(np.concatenate([np.arange(prefix), last]), batch)
    return _merge_pairs(static_rows(leave, batch), partner + prefix, stay, n, valid)


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
    check_range("match_random", "r", r, 0, n - prefix - 1)
    alive = jnp.ones(draws.shape, bool) if valid is None else valid
    # Absent tokens stay, so that r real ones merge; protected ones stay even before them.
    draws = jnp.where(alive, draws, jnp.finfo(draws.dtype).max)
    draws = jnp.where(leading_row(jnp.arange(n) < prefix, draws.ndim), jnp.inf, draws)
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
    check_range("merge_to_nearest", "k", k, prefix + 1, n)
    best, partner = nearest_kept(x, k, prefix=prefix, valid=valid)
    index = static_rows(range(k), x.shape[:-2])
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
    allowed = leading_row((slot >= prefix) & (slot < k), similar.ndim)
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
