"""Ids that enter a model: whether they fit it, where they stand, and where they are afterwards."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from tokred.ops import gather
from tokred.plan import AROUND, Plan
from tokred.tokens import Tokens


def count_positions(ids: Array, valid: Any, position: Any, seen: Array) -> Array:
    """`position`, or the places [B N] of valid tokens that follow `seen` [B] others."""
    if position is not None:
        return position
    if valid is None:
        return seen[:, None] + jnp.arange(ids.shape[1])[None]
    return seen[:, None] + jnp.cumsum(valid.astype(jnp.int32), axis=-1) - 1


def head_at(
    head: Callable[[Tokens], Array], tokens: Tokens, place: Int[Array, "B M"]
) -> Float[Array, "B M vocab"]:
    """head(tokens) of those that stood at these places of the sequence that entered, wherever they
    are now; 0 where they are gone, or a place is below 0."""
    there = jnp.maximum(place, 0)
    now = place
    if tokens.source is not None:
        now = jnp.where(place < 0, place, gather(tokens.source, there, axis=1))
    here = Tokens(gather(tokens.x, jnp.maximum(now, 0), axis=1))
    return jnp.where((now >= 0)[..., None], head(here), 0.0)


def check_ids(ids: Any, config: Any, plan: Plan) -> None:
    """Raises where ids do not fit a model's `context`, or (concrete ones only) its `vocab`."""
    if ids.ndim != 2:
        raise ValueError(f"ids: expected shape (B, N), got {ids.shape}; add or remove axes.")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids: expected integers, got {ids.dtype}; tokenise the text first.")
    if ids.shape[1] > config.context:
        raise ValueError(
            f"ids: {ids.shape[1]} tokens are more than the context of {config.context}; shorten "
            "the prompt or raise DecoderConfig.context."
        )
    _check_sharding(ids, plan)
    if isinstance(ids, Tracer) or not ids.size:
        return
    low, high = int(np.asarray(ids).min()), int(np.asarray(ids).max())
    if low < 0 or high >= config.vocab:
        raise ValueError(
            f"ids: found {low if low < 0 else high} outside the vocabulary of {config.vocab}; "
            "raise DecoderConfig.vocab or check the tokenizer."
        )


def _check_sharding(ids: Any, plan: Plan) -> None:
    routed = any(site.kind in AROUND for site, _ in plan.steps)
    spec = getattr(getattr(jax.typeof(ids), "sharding", None), "spec", ())
    if not isinstance(ids, Tracer):
        spec = getattr(getattr(ids, "sharding", None), "spec", spec)
    if routed and len(spec) > 1 and spec[1] is not None:
        raise ValueError(
            f"ids: the sequence axis is sharded over {spec[1]!r}, and plan {plan.name!r} compares "
            "all tokens of a sequence; shard the batch instead."
        )
