"""A mixture of experts in place of an MLP (Mixtral): every token takes its top k of M."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tokred.ops import segment_sum, top_k
from tokred.select import keep_top_k


def route(
    logits: Float[Array, "*B N M"], k: int
) -> tuple[Float[Array, "*B N k"], Int[Array, "*B N k"]]:
    """Probabilities over all experts, float32: the k highest, descending, and their experts.

    Their sum is below 1; see `renormalise`. Static: k. Gradient: to the chosen probabilities.
    """
    return top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), k)


def renormalise(weight: Float[Array, "*B N k"]) -> Float[Array, "*B N k"]:
    """Weights of every token that add up to 1; all 0 where it has none."""
    total = weight.sum(-1, keepdims=True)
    return weight / jnp.where(total == 0, 1.0, total)


def per_expert(
    weight: Float[Array, "*B N k"], expert: Int[Array, "*B N k"], experts: int
) -> Float[Array, "*B N M"]:
    """The weight of every expert for every token, 0 where it is not taken. Static: experts."""
    hot = jax.nn.one_hot(expert, experts, dtype=weight.dtype)
    return jnp.einsum("...k,...km->...m", weight, hot, precision="highest")


def expert_capacity(n: int, experts: int, k: int, *, factor: float = 1.25) -> int:
    """Slots per expert for n tokens that take k experts each: `factor` times the fair share."""
    return max(1, min(n, math.ceil(round(factor * n * k / experts, 6))))


class Experts(nnx.Module):
    """sum over experts m of weight_m · down_m(silu(gate_m x) · up_m x); weights from a router.

    The router is a Linear without bias; its k highest probabilities are renormalised.
    gate, up [M, D, F], down [M, F, D]. Source: Jiang et al. 2024, Mixtral.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        *,
        top_k: int = 2,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """width D, hidden F, experts M.

        Raises:
          ValueError: more experts per token than experts.
        """
        if not 1 <= top_k <= experts:
            raise ValueError(f"Experts: top_k={top_k} must lie in [1, {experts}]; change top_k.")
        self.experts, self.top_k, self.dtype = experts, top_k, dtype
        self.router = nnx.Linear(
            width, experts, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        init = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        weights = lambda a, b: nnx.Param(init(rngs.params(), (experts, a, b), param_dtype))  # noqa: E731
        self.gate, self.up = weights(width, hidden), weights(width, hidden)
        self.down = weights(hidden, width)

    def route(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N M"]:
        """The router's weight of every expert, float32; k of them are above 0."""
        weight, expert = route(self.router(x), self.top_k)
        return per_expert(renormalise(weight), expert, self.experts)

    def __call__(
        self, x: Float[Array, "*B N D"], weight: Float[Array, "*B N M"] | None = None
    ) -> Float[Array, "*B N D"]:
        """`masked`, by default with the router's own weights."""
        return self.masked(x, self.route(x) if weight is None else weight)

    def masked(
        self, x: Float[Array, "*B N D"], weight: Float[Array, "*B N M"]
    ) -> Float[Array, "*B N D"]:
        """Exact, at the cost of all experts for all tokens; the reference of `packed`.

        Gradient: to x and weight.
        """
        x, (gate, up, down) = self._cast(x)
        hidden = jax.nn.silu(jnp.einsum("...nd,mdf->...nmf", x, gate))
        hidden = hidden * jnp.einsum("...nd,mdf->...nmf", x, up)
        return jnp.einsum("...nmf,mfd->...nd", hidden * weight[..., None].astype(x.dtype), down)

    def packed(
        self, x: Float[Array, "*B N D"], weight: Float[Array, "*B N M"], capacity: int
    ) -> tuple[Float[Array, "*B N D"], Int[Array, "*B M"]]:
        """At the cost of `capacity` tokens per expert and example: (y, overflow per expert).

        Every expert takes the tokens that weigh it highest; those it has no room for go without
        it. With capacity = N nothing overflows. Static: capacity. Gradient: to x and weight.

        Raises:
          ValueError: capacity is not in [1, N].
        """
        x, (gate, up, down) = self._cast(x)
        n, axis = x.shape[-2], x.ndim - 2
        wanted = jnp.swapaxes(weight, -1, -2)  # [*B M N]
        map_ = keep_top_k(jax.lax.stop_gradient(wanted), capacity, valid=wanted > 0)
        rows = map_.apply(x[..., None, :, :])  # [*B M C D]
        hidden = jax.nn.silu(jnp.einsum("...mcd,mdf->...mcf", rows, gate))
        hidden = hidden * jnp.einsum("...mcd,mdf->...mcf", rows, up)
        hidden = hidden * map_.apply(wanted)[..., None].astype(x.dtype)
        update = jnp.einsum("...mcf,mfd->...mcd", hidden, down)
        target = jnp.where(map_.valid, map_.index, n)
        flat = lambda a, end: a.reshape(*a.shape[:axis], -1, *end)  # noqa: E731
        y = segment_sum(flat(update, x.shape[-1:]), flat(target, ()), n, axis=axis)
        return y, jnp.maximum((wanted > 0).sum(-1) - capacity, 0)

    def _cast(self, x: Array) -> tuple[Array, list[Array]]:
        """x and (gate, up, down) in the type that is computed in."""
        x = x.astype(self.dtype or x.dtype)
        return x, [w[...].astype(x.dtype) for w in (self.gate, self.up, self.down)]
