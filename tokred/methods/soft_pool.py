"""What soft assignments share: the tokens behind the prefix become few weighted sums of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokred.maps import TokenMap
from tokred.methods.connecting import with_body
from tokred.methods.topk import stage_counts
from tokred.plan import Layout, Plan, Reduction, Site, require_module
from tokred.select import share_out, soften
from tokred.tokens import Tokens, move


@dataclass(frozen=True)
class SoftPool(Reduction):
    """Base: `k` sums of a module's values, weighed by `select.soften` of its logits; see
    `nn.slimming`.

    The map shares every token out among the sums by what they take of it, and restores by the same
    shares. With as many sums as tokens nothing happens. Gradient: to the tokens and the module.
    """

    method: ClassVar[str] = "soft pooling"  # for errors
    over: ClassVar[str] = "tokens"
    k: int

    @property
    def rounds(self) -> int:
        """Of Sinkhorn."""
        return 1

    def counts(self, n: int, prefix: int) -> int:
        return prefix + self.k

    def module_macs(self, n: int, width: int) -> int:
        """Multiply-accumulates of the logits for `n` tokens behind the prefix."""
        raise NotImplementedError

    def macs(self, n: int, layout: Layout) -> int:
        if self.idle(n, layout.prefix):
            return 0
        body, width = n - layout.prefix, layout.width
        return self.module_macs(body, width) + body * self.k * width

    def pool(
        self, x: Float[Array, "*B N D"], valid: Bool[Array, "*B N"] | None, module: Any
    ) -> tuple[Float[Array, "*B K D"], Float[Array, "*B K N"]]:
        """(sums, weights) of the tokens behind the prefix."""
        values, logits = require_module(self, module)(x, valid)
        weights = soften(logits, over=self.over, rounds=self.rounds, valid=valid)
        return jnp.einsum("...kn,...nd->...kd", weights, values.astype(jnp.float32)), weights

    def __call__(
        self,
        tokens: Tokens,
        evidence: Mapping[str, Array],
        state: Any = None,
        *,
        module: Any = None,
        key: Any = None,
        train: bool = False,
        twin: str = "packed",
    ) -> tuple[Tokens, TokenMap | None, Any, dict[str, Any]]:
        n, prefix = tokens.n, tokens.prefix
        if self.idle(n, prefix):
            return tokens, None, state, {}
        valid = None if tokens.valid is None else tokens.valid[..., prefix:]
        y, weights = self.pool(tokens.x[..., prefix:, :], valid, module)
        map_ = share_out(weights, prefix=prefix, valid=valid)
        return with_body(self.method, move(tokens, map_), y), map_, state, {}


def staged(
    name: str,
    layout: Layout,
    keep: float,
    layers: Sequence[int] | None,
    make: Callable[[int], Reduction],
) -> Plan:
    """`make(k)` before each of the `layers`, k = int(keep^(i+1) patches) at the i-th; before none
    that all tokens reach: they need no evidence there."""
    every = layout.patches
    stages = ((i, k) for i, k in stage_counts(layout, keep, layers) if k < every)
    return Plan(tuple((Site("before", i), make(k)) for i, k in stages), name=name)
