"""Cache entries read in pages: nothing leaves, but a query reads only the pages that may matter."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.ops import gather
from tokred.select import keep_top_k


def pages_of(budget: int, page: int, entries: int) -> int:
    """How many pages a query reads: those that the budget fills, at least 3 if there are."""
    return min(max(3, min(budget, entries) // page), -(-entries // page))


def page_bounds(
    k: Float[Array, "*B T E"], page: int, valid: Bool[Array, "*B T"] | None = None
) -> tuple[Float[Array, "*B P E"], Float[Array, "*B P E"]]:
    """The least and the greatest value of every channel in pages of `page` (static) entries; of a
    page without any, +inf and -inf."""
    live = jnp.ones(k.shape[:-1], bool) if valid is None else valid
    low, high = (jnp.where(live[..., None], k, end) for end in (jnp.inf, -jnp.inf))
    more = [(0, 0)] * (k.ndim - 2) + [(0, -k.shape[-2] % page), (0, 0)]

    def cut(x: Array, end: float) -> Array:
        filled = jnp.pad(x, more, constant_values=end)
        return filled.reshape(*k.shape[:-2], -1, page, k.shape[-1])

    return cut(low, jnp.inf).min(-2), cut(high, -jnp.inf).max(-2)


def score_pages(
    q: Float[Array, "*B H E"], low: Float[Array, "*B G P E"], high: Float[Array, "*B G P E"]
) -> Float[Array, "*B H P"]:
    """Quest (Tang et al. 2024): the greatest product that a key within a page's bounds could have
    with each query, float32 and unscaled; -inf for an empty page. Source: mit-han-lab/Quest."""
    *batch, groups, pages, _ = low.shape
    q = q.astype(jnp.float32).reshape(*batch, groups, -1, q.shape[-1])
    empty = (low > high).any(-1)[..., None, :]
    bound = lambda part, side: jnp.einsum(  # noqa: E731
        "...gre,...gpe->...grp", part, jnp.where(jnp.isfinite(side), side, 0.0)
    )
    scores = bound(jnp.maximum(q, 0.0), high) + bound(jnp.minimum(q, 0.0), low)
    return jnp.where(empty, -jnp.inf, scores).reshape(*batch, -1, pages)


def choose_pages(scores: Float[Array, "*B H P"], count: int) -> Int[Array, "*B H count"]:
    """The best pages of every query head, in their order; empty ones only where there is nothing
    else."""
    return keep_top_k(scores, count, order="position").index


def read_pages(
    x: Float[Array, "*B G T E"], chosen: Int[Array, "*B H K"], page: int
) -> Float[Array, "*B H R E"]:
    """The R = K page entries of each query head's pages; T must fill whole pages."""
    *batch, groups, t, width = x.shape
    cut = x.reshape(*batch, groups, t // page, page, width)
    index = chosen.reshape(*batch, groups, -1)  # heads of a group side by side
    rows = gather(cut, index, axis=len(batch) + 1)
    return rows.reshape(*batch, chosen.shape[-2], -1, width)
