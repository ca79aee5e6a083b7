"""Clusters: which tokens stand for which others, by the distance of their features."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.maps import Assign
from tokred.ops import gather, top_k
from tokred.ops.attention import NEGATIVE
from tokred.score import mask_scores
from tokred.select.group import merge_into
from tokred.select.rows import check_range, static_rows
from tokred.select.soft import soften

NOISE = 1e-6  # of official densities
NORMS = ("l2", "sum")


def squared_distances(
    a: Float[Array, "*B N D"], b: Float[Array, "*B M D"]
) -> Float[Array, "*B N M"]:
    """Squared Euclidean distance of every pair of rows, float32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    cross = jnp.einsum("...nd,...md->...nm", a, b, precision=jax.lax.Precision.HIGHEST)
    length = lambda x: jnp.square(x).sum(-1)  # noqa: E731
    return jnp.maximum(length(a)[..., :, None] + length(b)[..., None, :] - 2 * cross, 0)


def cluster_by_density(
    x: Float[Array, "*B N D"],
    k: int,
    *,
    neighbours: int = 5,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
    draws: Float[Array, "*B N"] | None = None,
) -> Assign:
    """DPC-KNN: `k` density peaks, best first, and every other token to the nearest one.

    See `density_peaks`. draws: of the tokens, the prefix included. Static: k, neighbours.
    Source: Du et al. 2016; Zeng et al. 2022 (TCFormer).
    """
    body, alive = _body(x, prefix, valid)
    distance = _distances(body) / body.shape[-1] ** 0.5
    draws = None if draws is None else draws[..., prefix:]
    centres = density_peaks(distance, k, neighbours=neighbours, valid=alive, draws=draws)
    return _grouped(nearest_centre(distance, centres, valid=alive), centres, prefix, valid)


def density_peaks(
    distance: Float[Array, "*B N N"],
    k: int,
    *,
    neighbours: int = 5,
    valid: Bool[Array, "*B N"] | None = None,
    draws: Float[Array, "*B N"] | None = None,
) -> Int[Array, "*B {k}"]:
    """The `k` tokens with the largest density times distance to the nearest denser token.

    Density is exp(-mean squared distance to the `neighbours` nearest tokens, itself included); the
    densest token is as far from a denser one as any two tokens are. In log space, so that far
    outliers do not underflow to ties, of which the earlier one counts as denser. draws: as in the
    official code, uniform noise of 1e-6 on the density against ties instead, and no logs.
    """
    n = distance.shape[-1]
    check_range("density_peaks", "k", k, 1, n)
    check_range("density_peaks", "neighbours", neighbours, 1, max(n, neighbours))
    pair = jnp.ones(distance.shape, bool)
    if valid is not None:
        pair = valid[..., :, None] & valid[..., None, :]
    near = -top_k(jnp.where(pair, -distance, -jnp.inf), min(neighbours, n))[0]
    there = jnp.isfinite(near)
    density = -jnp.where(there, jnp.square(near), 0.0).sum(-1) / jnp.maximum(there.sum(-1), 1)
    density = density if draws is None else jnp.exp(density) + NOISE * draws
    mine, other = density[..., :, None], density[..., None, :]
    denser = other > mine
    if draws is None:
        earlier = jnp.tri(n, k=-1, dtype=bool)[*(None,) * (density.ndim - 1)]
        denser |= (other == mine) & earlier
    widest = jnp.where(pair, distance, 0.0).max((-2, -1), keepdims=True)
    gap = jnp.where(denser & pair, distance, widest).min(-1)
    score = density + jnp.log(gap) if draws is None else density * gap
    return top_k(mask_scores(score, valid), k)[1]


def cluster_medoids(
    x: Float[Array, "*B N D"],
    k: int,
    weight: Float[Array, "*B N"] | None = None,
    *,
    iterations: int = 3,
    prefix: int = 0,
    valid: Bool[Array, "*B N"] | None = None,
) -> Assign:
    """k-medoids: tokens join the nearest of `k` medoids, and each group's new medoid is its member
    with the least weight times summed distance to all tokens, those of other groups too.

    weight: those with the most are the first medoids; None for all alike, from `farthest_points`.
    A medoid stays in its own group. Static: k, iterations.
    Source: Marin et al. 2023 (Token Pooling), as in JoakimHaurum/TokenReduction `k_medoids_fit`.
    """
    body, alive = _body(x, prefix, valid)
    distance = _distances(body)
    check_range("cluster_medoids", "k", k, 1, distance.shape[-1])
    seen = distance if alive is None else jnp.where(alive[..., None, :], distance, 0.0)
    cost = seen.sum(-1)
    if weight is None:
        medoids = farthest_points(distance, k, valid=alive)
    else:
        weight = mask_scores(weight[..., prefix:], alive)
        medoids, cost = top_k(weight, k)[1], weight * cost
    for _ in range(iterations):
        target = nearest_centre(distance, medoids, valid=alive)
        medoids = _cheapest(target, cost, medoids, alive)
    return _grouped(nearest_centre(distance, medoids, valid=alive), medoids, prefix, valid)


def _cheapest(target: Array, cost: Array, medoids: Array, valid: Array | None) -> Array:
    """The cheapest valid member of each group; the old medoid of a group without any."""
    k = medoids.shape[-1]
    slots = jnp.arange(k).reshape((1,) * (target.ndim - 1) + (k, 1))
    member = target[..., None, :] == slots
    member = member if valid is None else member & valid[..., None, :]
    best = jnp.where(member, cost[..., None, :], jnp.inf).argmin(-1)
    return jnp.where(member.any(-1), best.astype(jnp.int32), medoids)


def farthest_points(
    distance: Float[Array, "*B N N"],
    k: int,
    *,
    first: Int[Array, "*B"] | None = None,
    valid: Bool[Array, "*B N"] | None = None,
) -> Int[Array, "*B {k}"]:
    """`first` (default: the first valid token), then always the one farthest from all so far."""
    batch, n = distance.shape[:-2], distance.shape[-1]
    alive = jnp.ones((*batch, n), bool) if valid is None else valid
    first = alive.argmax(-1) if first is None else first
    chosen = jnp.broadcast_to(first.astype(jnp.int32)[..., None], (*batch, k))
    distance = _own_nearest(distance)

    def add(i: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        chosen, gap = so_far
        last = jax.lax.dynamic_slice_in_dim(chosen, i - 1, 1, axis=-1)
        gap = jnp.minimum(gap, gather(distance, last, axis=len(batch))[..., 0, :])
        new = gap.argmax(-1).astype(jnp.int32)[..., None]
        return jax.lax.dynamic_update_slice_in_dim(chosen, new, i, axis=-1), gap

    return jax.lax.fori_loop(1, k, add, (chosen, jnp.where(alive, jnp.inf, -jnp.inf)))[0]


def nearest_centre(
    distance: Float[Array, "*B N N"],
    centres: Int[Array, "*B K"],
    *,
    valid: Bool[Array, "*B N"] | None = None,
) -> Int[Array, "*B N"]:
    """Which of the valid `centres` is the nearest one; each is its own."""
    rows = gather(_own_nearest(distance), centres, axis=distance.ndim - 2)
    if valid is not None:
        rows = jnp.where(gather(valid, centres, axis=valid.ndim - 1)[..., None], rows, jnp.inf)
    return rows.argmin(-2).astype(jnp.int32)


def cluster_softly(
    x: Float[Array, "*B N D"],
    centres: Float[Array, "*B K D"],
    *,
    iterations: int = 5,
    temperature: float = 1.0,
    allowed: Bool[Array, "*#B K N"] | None = None,
    valid: Bool[Array, "*B N"] | None = None,
) -> Float[Array, "*B K N"]:
    """Soft k-means: how much each token belongs to each group, a total of 1 over the groups.

    A softmax of -temperature times the squared distance to the centres, which then become the
    means of what belongs to them: `iterations` times, from `centres` on. allowed: which pairs may
    meet. Static: iterations. Gradient: none.
    Source: Liang et al. 2022, Expedit `TokenClusteringBlock`.
    """
    x, _ = _body(x, 0, valid)
    centres, belongs = jax.lax.stop_gradient(centres), None
    for _ in range(iterations):
        if belongs is not None:
            mass = jnp.maximum(belongs.sum(-1, keepdims=True), 1e-16)
            centres = jnp.einsum("...kn,...nd->...kd", belongs, x) / mass
        logits = -temperature * squared_distances(centres, x)
        belongs = soften(logits, over="groups", valid=valid, allowed=allowed)
    if belongs is None:
        raise ValueError(f"cluster_softly: iterations={iterations} must be at least 1; raise it.")
    return belongs


def spread_back(
    x: Float[Array, "*B N D"],
    centres: Float[Array, "*B K D"],
    *,
    neighbours: int = 20,
    temperature: float = 1.0,
    norm: str = "l2",
    valid: Bool[Array, "*B N"] | None = None,
    there: Bool[Array, "*B K"] | None = None,
) -> Float[Array, "*B N K"]:
    """What each token gets back of each of its nearest `centres` (and of those that tie with the
    last): exp(-temperature * squared distance), over the weights' length or sum.

    norm: 'l2' as in the official code | 'sum' as in the paper. valid: of the tokens. there: of the
    centres. Static: neighbours, norm. Gradient: none.
    Source: Liang et al. 2022, Expedit `TokenReconstructionBlock`.

    Raises:
      ValueError: an unknown norm, or no neighbour.
    """
    if norm not in NORMS:
        raise ValueError(f"spread_back: norm={norm!r} must be one of {NORMS}; change norm.")
    k = centres.shape[-2]
    check_range("spread_back", "neighbours", neighbours, 1, max(k, neighbours))
    x, _ = _body(x, 0, valid)
    logits = -temperature * squared_distances(x, jax.lax.stop_gradient(centres))
    logits = logits if there is None else jnp.where(there[..., None, :], logits, NEGATIVE)
    last = top_k(logits, min(neighbours, k))[0][..., -1:]
    weight = jnp.exp(logits - logits.max(-1, keepdims=True)) * (logits >= last)
    size = jnp.linalg.norm(weight, ord=2 if norm == "l2" else 1, axis=-1, keepdims=True)
    weight = weight / size
    return weight if valid is None else weight * valid[..., None]


def nearest_of(
    x: Float[Array, "*B N D"],
    centres: Float[Array, "*B K D"],
    *,
    there: Bool[Array, "*B K"] | None = None,
) -> Int[Array, "*B N"]:
    """Which of the centres that are `there` is the nearest to each token. Gradient: none."""
    square = squared_distances(x, centres)
    square = square if there is None else jnp.where(there[..., None, :], square, jnp.inf)
    return square.argmin(-1).astype(jnp.int32)


def _body(x: Array, prefix: int, valid: Array | None) -> tuple[Array, Array | None]:
    """Float32 features and validity behind the prefix, invalid rows 0, without a gradient."""
    x = jax.lax.stop_gradient(x[..., prefix:, :]).astype(jnp.float32)
    if valid is None:
        return x, None
    valid = valid[..., prefix:]
    return jnp.where(valid[..., None], x, 0.0), valid


def _distances(x: Float[Array, "*B N D"]) -> Float[Array, "*B N N"]:
    """Euclidean, exactly 0 to itself."""
    others = 1.0 - jnp.eye(x.shape[-2])
    return jnp.sqrt(squared_distances(x, x)) * others[*(None,) * (x.ndim - 2)]


def _own_nearest(distance: Float[Array, "*B N N"]) -> Float[Array, "*B N N"]:
    """Every token closer to itself than to one just like it."""
    return distance - jnp.eye(distance.shape[-1])[*(None,) * (distance.ndim - 2)]


def _grouped(target: Array, index: Array, prefix: int, valid: Array | None) -> Assign:
    """Groups of the tokens behind the prefix, and the prefix in front, each alone."""
    front = static_rows(range(prefix), target.shape[:-1])
    behind = lambda a: jnp.concatenate([front, a + prefix], -1)  # noqa: E731
    return merge_into(behind(target), prefix + index.shape[-1], behind(index), valid)
