"""What methods that route tokens around layers share: who enters, with which weight, and losses."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from tokred.maps import Keep
from tokred.ops import gather
from tokred.plan import Layout, Site
from tokred.select import keep_top_k
from tokred.tokens import Tokens, move

POSITIONS = ("renumber", "keep")
LATENT_SITES = ("after", "output")
Routed = tuple[Tokens, Keep, Float[Array, "*B K"]]


def alternate_layers(layout: Layout) -> tuple[int, ...]:
    """Every second layer, the first one dense."""
    return tuple(range(1, layout.depth, 2))


def inner_span(layout: Layout) -> tuple[int, int]:
    """First and last layer of all but the first and the last quarter."""
    outer = layout.depth // 4
    return outer, layout.depth - 1 - outer


def share_of(count: int, share: float) -> int:
    """floor(share * count), safe from rounding: 0.29 of 100 is 29."""
    return int(share * count + 1e-6)


def check_share(method: str, field: str, value: float) -> None:
    """Raises ValueError outside (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{method}: {field}={value} must lie in (0, 1]; change {field}.")


def check_capacity(method: str, field: str, value: float, k: int, n: int) -> int:
    """k, the tokens that enter a layer. Raises ValueError where there are none."""
    if k < 1:
        raise ValueError(
            f"{method}: {field}={value} of {n} tokens lets none enter; raise {field}, or decode "
            "single tokens under plan.with_twin('causal')."
        )
    return k


def per_row(
    counts: Callable[[int], int], n: int, valid: Bool[Array, "*B N"] | None
) -> Array | None:
    """counts(number of valid tokens) of each example, from a static table; None where all are."""
    if valid is None:
        return None
    return of_count(counts, n, valid.sum(-1))


def of_count(counts: Callable[[int], int], n: int, m: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """counts(m) for traced m in [0, n], from a static table."""
    return jnp.asarray([counts(i) for i in range(n + 1)], jnp.int32)[m]


def keep_share(
    scores: Float[Array, "*B N"],
    counts: Callable[[int], int],
    valid: Bool[Array, "*B N"] | None,
) -> Keep:
    """Expert choice: of n valid tokens the counts(n) with the highest scores, in their order."""
    n = scores.shape[-1]
    limit = per_row(counts, n, valid)
    return keep_top_k(scores, counts(n), valid=valid, order="position", limit=limit)


def keep_decided(decision: Bool[Array, "*B N"], valid: Bool[Array, "*B N"] | None) -> Keep:
    """Every token in its own slot, valid where it decided to enter."""
    n = decision.shape[-1]
    every = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), decision.shape)
    return Keep(every, n, decision if valid is None else decision & valid, ordered=True)


def keep_chosen(
    chosen: Bool[Array, "*B N"],
    counts: Callable[[int], int],
    valid: Bool[Array, "*B N"] | None,
    *,
    scores: Float[Array, "*B N"] | None = None,
) -> tuple[Keep, Int[Array, "*B"]]:
    """Token choice: of n valid tokens at most counts(n) of the `chosen`, in their order.

    Where more are chosen, those with the highest scores, or the first without scores. Returns the
    map and the overflow: how many chosen ones found no slot. As many slots as tokens: each has its
    own.
    """
    n = chosen.shape[-1]
    k, alive = counts(n), chosen if valid is None else chosen & valid
    room = per_row(counts, n, valid)
    overflow = jnp.maximum(alive.sum(-1) - (k if room is None else room), 0)
    if k == 0:
        return nobody(chosen.shape[:-1], n), overflow
    if k == n:
        return keep_decided(chosen, valid), overflow
    rank = jnp.zeros(chosen.shape) if scores is None else scores
    return keep_top_k(rank, k, valid=alive, order="position", limit=room), overflow


def nobody(batch: tuple[int, ...], n: int) -> Keep:
    """No token enters, by the plan: the layer is left out."""
    return Keep(jnp.zeros((*batch, 0), jnp.int32), n)


def room_of(n: int, share: float) -> int:
    """Slots for a share of n tokens, rounded up; at least one."""
    return max(1, math.ceil(round(share * n, 6)))


def enter(tokens: Tokens, map_: Keep, weight: Float[Array, "*B N"], *, twin: str) -> Routed:
    """(tokens that enter, map, their weights): gathered, or masked in their slots."""
    map_ = map_.masked() if twin != "packed" and map_.k != map_.n else map_
    return move(tokens, map_), map_, gather(weight, map_.index, axis=weight.ndim - 1)


def renumber(tokens: Tokens, held: Float[Array, "*B 1"] | Int[Array, "*B 1"] | int = 0) -> Tokens:
    """Tokens at the places held, held + 1, ... in the order of their slots; documents stay."""
    if tokens.position is None:
        return tokens
    entered = jnp.ones((*tokens.batch, tokens.n), bool) if tokens.valid is None else tokens.valid
    place = held + jnp.cumsum(entered, axis=-1) - 1
    place = jnp.where(entered, place, -1)[..., None].astype(tokens.position.dtype)
    rest = tokens.position[..., 1:]
    rest = jnp.broadcast_to(rest, (*tokens.batch, *rest.shape[-2:]))
    return tokens.replace(position=jnp.concatenate([place, rest], axis=-1))


def check_positions(method: str, positions: str) -> None:
    """Raises ValueError for what is none of `POSITIONS`."""
    if positions not in POSITIONS:
        raise ValueError(
            f"{method}: positions={positions!r} must be one of {POSITIONS}; change it."
        )


def check_sequence(method: str, layout: Layout) -> None:
    """Raises ValueError for a model whose tokens form a grid, or have others in front."""
    if layout.prefix or layout.grid[0] != 1:
        raise ValueError(
            f"{method}: cuts a sequence, and this model reads a grid of {layout.grid} with "
            f"{layout.prefix} tokens in front; use a decoder."
        )


def selected(map_: Keep) -> Bool[Array, "*B N"]:
    """Which tokens entered."""
    return jax.lax.stop_gradient(map_.source) >= 0


def mean_over(value: Float[Array, "*B N"], valid: Bool[Array, "*B N"] | None) -> Array:
    """The mean over all valid tokens of the batch."""
    if valid is None:
        return value.mean()
    return jnp.where(valid, value, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def membership_loss(
    logits: Float[Array, "*B N"], chosen: Bool[Array, "*B N"], valid: Any
) -> Float[Array, ""]:
    """Binary cross entropy of a gate's logits with having been chosen. Gradient: to logits."""
    target = jax.lax.stop_gradient(chosen).astype(jnp.float32)
    return mean_over(optax.sigmoid_binary_cross_entropy(logits, target), valid)


def at_least_one(
    chosen: Bool[Array, "*B N"], scores: Float[Array, "*B N"], valid: Bool[Array, "*B N"] | None
) -> Bool[Array, "*B N"]:
    """The chosen tokens, or where there are none the valid one with the highest score, of equal
    ones the first; none where no token is valid."""
    alive = jnp.ones_like(chosen) if valid is None else valid
    best = jax.nn.one_hot(jnp.where(alive, scores, -jnp.inf).argmax(-1), chosen.shape[-1])
    chosen &= alive
    return chosen | (alive & (best > 0) & ~chosen.any(-1, keepdims=True))


def describe(chosen: Bool[Array, "*B N"], valid: Any) -> dict[str, Array]:
    """What a report tells of a routed layer."""
    return {"entered": chosen, "share": mean_over(chosen.astype(jnp.float32), valid)}


def require_extra(method: str, tokens: Tokens, name: str) -> Array:
    """A per-token array by name. Raises ValueError where the call did not give it."""
    extra: Mapping[str, Array] = tokens.extra
    if name not in extra:
        raise ValueError(
            f"{method}: needs the per-token array {name!r} (present: {sorted(extra)}); pass it to "
            f"the model as extra={{{name!r}: ...}}."
        )
    return extra[name]


def layers_or(layers: Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
    """The layers asked for, else the default ones."""
    return tuple(default if layers is None else layers)


def extra_or(method: str, tokens: Tokens, name: str, default: Any, *, twin: str) -> Array:
    """Like `require_extra`; a token that is decoded alone needs no entry, it is `default`."""
    if twin == "causal" and tokens.n == 1 and name not in tokens.extra:
        return jnp.full((*tokens.batch, 1), default)
    return require_extra(method, tokens, name)


def place_latents(
    method: str, layout: Layout, latents: int | None, layer: int | None, site: str
) -> tuple[Site, int]:
    """Where latent tokens leave, and how many there are.

    latents: how many of the last tokens, by default all behind the prefix. layer: the encoder's
    last, by default the middle one. site: 'after' it, or 'output': the whole model is the encoder.

    Raises:
      ValueError: more latents than tokens, or another site.
    """
    patches = layout.patches
    latents = patches if latents is None else latents
    if not 1 <= latents <= patches:
        raise ValueError(
            f"{method}: latents={latents} must lie in [1, {patches}], the tokens behind the "
            "prefix; change latents."
        )
    if site not in LATENT_SITES:
        raise ValueError(f"{method}: site={site!r} must be one of {LATENT_SITES}; change site.")
    if site == "output":
        return Site("output"), latents
    middle = max(layout.depth // 2 - 1, 0)
    return Site("after", middle if layer is None else layer), latents
