"""How the update of the tokens that entered a layer is put back into the stream of all tokens."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokred.maps import Keep, TokenMap
from tokred.ops.gather import aligned, put

RULES = ("residual", "mlp_branch", "scale_all")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "fill", "restore"],
    meta_fields=["rule"],
)
@dataclass(frozen=True)
class Combine:
    """What a reduction around a layer, or around one of its branches, hands over as
    aux['combine'].

    weight: Float[*B K] per token that enters, or None for 1 · fill: Float[*B N D], what the tokens
    that skip become, or None for what they were · rule, static, u = x + Attention:
    'residual' x + w (block(x) - x), Mixture-of-Depths; with w in {0, 1} Router-Tuning ·
    'mlp_branch' u + w MLP(u), gamma-MoD and, with fill = w x, p-MoD's symmetric form ·
    'scale_all' w block(x), the residual included · restore: where what came out does not go back
    as it came in: a pytree with restore([*B K D]) -> [*B N D], another map or a dataclass; then
    all tokens become `fill`, or None for 0, plus what it makes of those that entered.

    Gradient: to weight, fill and what `restore` holds.
    """

    weight: Any = None
    fill: Any = None
    rule: str = "residual"
    restore: Any = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"Combine: rule={self.rule!r} must be one of {RULES}; change rule.")

    @property
    def mlp_weight(self) -> Float[Array, "*B K"] | None:
        """What the MLP branch alone is multiplied by."""
        return self.weight if self.rule == "mlp_branch" else None

    def put_back(
        self,
        x: Float[Array, "*B N D"],
        before: Float[Array, "*B K D"],
        after: Float[Array, "*B K D"],
        map_: TokenMap | None,
    ) -> Float[Array, "*B N D"]:
        """All tokens after the layer; before, after: those that entered it.

        Where all did (no map), or tokens that had been merged (their update is then that of each
        member), the update is added to `fill`.
        """
        y = self._weighed(before, after)
        if self.restore is not None:
            back = self.restore.restore(y)
            return (back if self.fill is None else self.fill + back).astype(x.dtype)
        fill = x if self.fill is None else self.fill.astype(x.dtype)
        if isinstance(map_, Keep):
            return _written(fill, y, map_)
        if map_ is None:
            return y if self.fill is None else fill + (y - before)
        return fill + map_.restore(y - before)

    def _weighed(self, before: Array, after: Array) -> Array:
        if self.weight is None or self.rule == "mlp_branch":
            return after
        weight = aligned(self.weight, after.ndim, after.ndim - 2).astype(after.dtype)
        if self.rule == "scale_all":
            return weight * after
        return before + weight * (after - before)


def _written(fill: Array, y: Array, map_: Keep) -> Array:
    """map_.restore(y, fill), whose gradient adds up all N rows, where this one moves K."""
    slots = jax.lax.broadcasted_iota(jnp.int32, map_.index.shape, len(map_.batch))
    index = map_.index if map_.valid is None else jnp.where(map_.valid, map_.index, map_.n + slots)
    return put(fill.astype(y.dtype), index, y, axis=y.ndim - 2)
