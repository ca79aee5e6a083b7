"""How many cache entries each layer and each head keeps."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokred.maps import Assign
from tokred.ops.gather import aligned
from tokred.score import mask_scores
from tokred.select import keep_top_k


def pyramid_budgets(
    length: int, keep: float, layers: int, *, window: int = 64, beta: float = 20.0
) -> tuple[int, ...]:
    """PyramidKV (Cai et al. 2024): budgets fall linearly with depth, length * keep on average.

    The deepest keeps 1 / beta of the mean, the first what is left to give. Where no such line lies
    within [window, length], all get the same. Rounding: half to even. Source: NVIDIA/kvpress.
    """
    mean = (window + length * keep) - window  # a rounding of the official order
    low = mean / beta
    high = 2 * mean - low
    if high >= length - window:
        high = length - window
        low = 2 * mean - high
    if not length >= high >= low >= window or layers < 2:
        return (round(length * keep),) * layers
    step = (high - low) / (layers - 1)
    return tuple(round(high - layer * step) for layer in range(layers))


def keep_pooled(
    scores: Float[Array, "*B G T"],
    k: int,
    *,
    floor: float = 0.2,
    valid: Bool[Array, "*B G T"] | None = None,
) -> Bool[Array, "*B G T"]:
    """AdaKV (Feng et al. 2024): the G k best entries of all heads together, of each head at least
    int(floor k) (static).

    Scores must be comparable between heads, as shares of attention are. Source: NVIDIA/kvpress.
    """
    *batch, g, t = scores.shape
    safe = int(k * floor)
    if safe:
        sure = keep_top_k(scores, safe, valid=valid).source >= 0
        scores = jnp.where(sure, jnp.inf, mask_scores(scores, valid))
    pooled = keep_top_k(
        scores.reshape(*batch, g * t),
        g * k,
        valid=None if valid is None else valid.reshape(*batch, g * t),
    )
    return (pooled.source >= 0).reshape(scores.shape)


def fold_middle(
    length: Int[Array, "*B"], slots: int, k: int, *, sinks: int = 4
) -> tuple[Assign, Float[Array, "*B k"]]:
    """RazorAttention (Tang et al. 2024): the first `sinks` entries and the latest keep a slot each,
    those between share one; (map from `slots` to k slots, log of the entries in each).

    length: entries, which come first in their slots. Where they fit, none is folded. The log is
    what makes a slot weigh as much as its entries do; the vendor's code leaves it out. The first
    entry of a slot stands for it under how='keep'. Static: slots, k, sinks. Raises ValueError where
    nothing but sinks and the shared slot fit.
    """
    if k < sinks + 2:
        raise ValueError(
            f"fold_middle: k={k} slots must exceed the {sinks} sinks by two at least; raise k."
        )
    place = aligned(jnp.arange(slots), length.ndim + 1, length.ndim)
    length = length[..., None]
    recent = length - (k - sinks - 1)
    shared = jnp.maximum(sinks, k - 1 - (length - 1 - place))
    target = jnp.where(place < sinks, place, jnp.where(place < recent, sinks, shared))
    target = jnp.where(length <= k, jnp.broadcast_to(place, target.shape), target)
    target = jnp.where(place < length, target, k).astype(jnp.int32)
    slot = aligned(jnp.arange(k), length.ndim, length.ndim - 1)
    first = jnp.where((slot > sinks) & (length > k), length - k + slot, slot)
    sizes = Assign(target, k).sizes()
    map_ = Assign(target, k, index=jnp.minimum(first, slots - 1), valid=sizes > 0)
    return map_, jnp.log(jnp.maximum(sizes, 1.0))
