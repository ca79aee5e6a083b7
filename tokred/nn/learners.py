"""A layer of variable width: learners whose outputs add up, as many per token as a gate chooses."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tokred.gates import straight_through
from tokred.maps import Keep
from tokred.nn.mlp import activate
from tokred.ops import top_k
from tokred.ops.gather import aligned

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    **{name: partial(activate, kind=name) for name in ("gelu", "gelu_tanh", "silu")},
    "identity": lambda x: x,
}
BIASES = ("all", "hidden", "output", "none")
RULES = ("exact", "official")


def learner_width(
    width: int, learners: int, *, hidden: int | None = None, factor: float = 1.0
) -> int:
    """Hidden width of each learner so that all together cost `factor` times the original layer.

    hidden: that of the original MLP, or None where the original is one projection with a bias.

    Raises:
      ValueError: nothing is left for a learner.
    """
    whole = (width**2 + width) / (2 * width + 1) if hidden is None else hidden
    found = round(factor / learners * whole)
    if found < 1:
        raise ValueError(
            f"learner_width: factor={factor} over {learners} learners leaves no hidden unit of "
            f"{whole:g}; raise factor or use fewer learners."
        )
    return found


class Learners(nnx.Module):
    """n sequential learners, fused: y_k = b2_0 + sum over j <= k of (h_j W2_j + b2_j), where h is
    act(x W1 + b1) cut into n chunks; a token's count k lies in 0..n.

    W1 [D, n d], b1 [n d], W2 [n d, D], b2 [n+1, D]. Computes in the type of x.
    Source: Wojcik et al. 2023, bartwojcik/adaptive_computation_modules `AdaptiveComputationMLP`,
    which gives MLPs GELU and hidden biases, and projections (q, k, v, o) no activation.
    """

    def __init__(
        self,
        width: int,
        learners: int,
        hidden: int,
        *,
        activation: str = "gelu",
        bias: str = "hidden",
        rngs: nnx.Rngs,
    ):
        """width D, learners n, hidden d of each. bias: 'all' | 'hidden' (b1) | 'output' (b2) |
        'none'.

        Raises:
          ValueError: an unknown activation or bias.
        """
        _choose("activation", activation, tuple(ACTIVATIONS))
        _choose("bias", bias, BIASES)
        self.learners, self.hidden, self.activation = learners, hidden, activation

        def uniform(shape: tuple[int, ...], fan: int) -> nnx.Param:
            bound = fan**-0.5
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.w1 = uniform((width, learners * hidden), learners * hidden)
        self.w2 = uniform((learners * hidden, width), width)
        self.b1 = uniform((learners * hidden,), hidden) if bias in ("all", "hidden") else None
        self.b2 = uniform((learners + 1, width), width) if bias in ("all", "output") else None

    def parts(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N k D"]:
        """What each count adds, k = n+1: b2_0 for count 0, then every learner's own output."""
        hidden = self._hidden(x, slice(None)).reshape(*x.shape[:-1], self.learners, self.hidden)
        w2 = self.w2[...].astype(x.dtype).reshape(self.learners, self.hidden, -1)
        outputs = jnp.einsum("...jh,jhd->...jd", hidden, w2)
        parts = jnp.concatenate([jnp.zeros_like(outputs[..., :1, :]), outputs], axis=-2)
        return parts if self.b2 is None else parts + _fit(self.b2[...].astype(x.dtype), parts)

    def all(
        self, x: Float[Array, "*B N D"], *, own_gradient: bool = False
    ) -> Float[Array, "*B N k D"]:
        """y_k for every count k in 0..n. own_gradient: output k trains learner k alone."""
        parts = self.parts(x)
        total = jnp.cumsum(parts, axis=-2)
        return straight_through(total, parts) if own_gradient else total

    def masked(
        self, x: Float[Array, "*B N D"], choice: Float[Array, "*B N k"]
    ) -> Float[Array, "*B N D"]:
        """sum over k of choice_k y_k at the cost of all learners; the reference of `packed`.

        choice: one-hot or soft. Gradient: to x and choice.
        """
        reach = jnp.cumsum(choice[..., ::-1], axis=-1)[..., ::-1].astype(x.dtype)  # of count >= k
        hidden = self._hidden(x, slice(None))
        hidden = hidden * jnp.repeat(reach[..., 1:], self.hidden, axis=-1)
        y = hidden @ self.w2[...].astype(x.dtype)
        return y if self.b2 is None else y + reach @ self.b2[...].astype(x.dtype)

    def packed(
        self,
        x: Float[Array, "*B N D"],
        count: Int[Array, "*B N"],
        capacities: Sequence[int],
        *,
        rule: str = "exact",
    ) -> tuple[Float[Array, "*B N D"], Int[Array, "*B"]]:
        """y_count at the cost of the capacities: (y, overflow = tokens that got fewer learners).

        Tokens are sorted by count once; learner j takes the first capacities[j-1] of them, so
        that one without room gets y_k of the largest k that has room.
        capacities: per example, one for each learner, not rising, static.
        rule: 'exact', or 'official': tokens with the largest count of the batch lose their last
        learner, as in the released gated path. Gradient: to x.

        Raises:
          ValueError: capacities that do not fit, or an unknown rule.
        """
        n = x.shape[-2]
        _check_capacities(capacities, self.learners, n)
        if _choose("rule", rule, RULES) == "official":
            count = jnp.minimum(count, jnp.maximum(count.max() - 1, 0))
        wanted, order = top_k(count.astype(jnp.float32), n)
        room = (np.arange(n)[:, None] < np.asarray(capacities)).sum(-1)
        given = jnp.minimum(wanted, _fit(jnp.asarray(room, jnp.float32), wanted))
        front = Keep(order[..., : capacities[0]], n)
        y = front.restore(self._prefixes(front.apply(x), given, capacities))
        if self.b2 is not None:
            y = y + _fit(self.b2[0].astype(x.dtype), y)
        return y, (given < wanted).sum(-1)

    def _prefixes(self, rows: Array, given: Array, capacities: Sequence[int]) -> Array:
        """Sum of the learners' outputs for tokens sorted by count, `given` [*B N] to each."""
        total = jnp.zeros_like(rows)
        for j, capacity in enumerate(capacities):
            takes = given[..., :capacity, None] > j
            output = self._learner(j, rows[..., :capacity, :])
            total = total.at[..., :capacity, :].add(jnp.where(takes, output, 0))
        return total

    def _learner(self, j: int, x: Array) -> Array:
        part = slice(j * self.hidden, (j + 1) * self.hidden)
        y = self._hidden(x, part) @ self.w2[part].astype(x.dtype)
        return y if self.b2 is None else y + _fit(self.b2[j + 1].astype(x.dtype), y)

    def _hidden(self, x: Array, part: slice) -> Array:
        hidden = x @ self.w1[:, part].astype(x.dtype)
        if self.b1 is not None:
            hidden = hidden + _fit(self.b1[part].astype(x.dtype), hidden)
        return ACTIVATIONS[self.activation](hidden)


class CountGate(nnx.Module):
    """Logits over counts 0..n per token, float32: one Linear, or a stack of `depth` Linears of
    width `hidden` without activation between them, a factorised map.

    least: the smallest count on offer; logits below it are -inf (1 for q, k, v, o projections).
    """

    def __init__(
        self,
        width: int,
        learners: int,
        *,
        hidden: int = 16,
        depth: int = 3,
        least: int = 0,
        rngs: nnx.Rngs,
    ):
        self.least = least
        sizes = gate_sizes(width, learners, hidden=hidden, depth=depth, least=least)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in sizes])

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N k"]:
        for layer in self.layers:
            x = layer(x)
        never = jnp.full((*x.shape[:-1], self.least), -jnp.inf, jnp.float32)
        return jnp.concatenate([never, x.astype(jnp.float32)], axis=-1)


def gate_sizes(
    width: int, learners: int, *, hidden: int = 16, depth: int = 3, least: int = 0
) -> tuple[tuple[int, int], ...]:
    """(in, out) of a CountGate's Linears."""
    return tuple(pairwise([width, *[hidden] * (depth - 1), learners + 1 - least]))


class GatedLearners(nnx.Module):
    """Learners and the gate that counts them."""

    def __init__(self, learners: Learners, gate: CountGate):
        self.learners, self.gate = learners, gate


def _choose(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"Learners: {name}={value!r} must be one of {known}; change {name}.")
    return value


def _check_capacities(capacities: Sequence[int], learners: int, n: int) -> None:
    falling = all(a >= b for a, b in pairwise([n, *capacities, 0]))
    if len(capacities) != learners or not falling or capacities[0] < 1:
        raise ValueError(
            f"Learners: capacities={tuple(capacities)} must be {learners} counts that do not rise, "
            f"the first in [1, {n}]; change capacities."
        )


def _fit(rows: Array, like: Array) -> Array:
    """`rows` with unit axes in front: rank promotion stays explicit."""
    return aligned(rows, like.ndim, like.ndim - 1)
