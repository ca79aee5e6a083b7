"""The whole grid again, behind what reduced it: for connectors that need every patch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tokred.methods.registry import register
from tokred.nn.embeddings import grid_positions
from tokred.ops import gather
from tokred.plan import Layout, Plan, Reduction, Site
from tokred.tokens import Tokens


@dataclass(frozen=True)
class Restore(Reduction):
    """Every patch of the `grid` gets the features of the token that it is now part of.

    A patch that went nowhere, or never was there, or whose token a policy hides, is invalid. Each
    stands for itself again: sizes, biases and policies of what it was part of end here. Gradient:
    to the tokens and their policy.
    """

    grid: tuple[int, int]
    grows: ClassVar[bool] = True

    def counts(self, n: int, prefix: int) -> int:
        return prefix + self.grid[0] * self.grid[1]

    def expected_count(self, n: Any, prefix: int, aux: Mapping[str, Any]) -> int:
        return self.counts(0, prefix)  # whatever comes in

    def __call__(
        self, tokens: Tokens, evidence: Mapping[str, Array], state: Any = None, **how: Any
    ) -> tuple[Tokens, None, Any, dict[str, Any]]:
        source, n = tokens.source, self.counts(tokens.n, tokens.prefix)
        if source is None and tokens.policy is None:
            return tokens, None, state, {}
        source, x = tokens.sources(), tokens.x
        if source.shape[-1] != n:
            raise ValueError(
                f"restore: {source.shape[-1]} tokens entered the model, and grid={self.grid} with "
                f"the prefix has {n}; change grid."
            )
        back = lambda a: gather(a, jnp.maximum(source, 0), axis=source.ndim - 1)  # noqa: E731
        valid = source >= 0
        if tokens.policy is not None:
            valid &= back(tokens.policy) > 0
            x = x * tokens.policy[..., None].astype(x.dtype)
        outside = np.full((tokens.prefix, 2), -1, np.float32)
        place = jnp.asarray(np.concatenate([outside, grid_positions(self.grid)]))
        whole = Tokens(
            jnp.where(valid[..., None], back(x), 0),
            valid=valid,
            position=jnp.where(valid[..., None], place, -1),
            extra=jax.tree.map(back, dict(tokens.extra)),
            memo=tokens.memo,
            prefix=tokens.prefix,
        )
        return whole, None, state, {}


@register("restore", family="merge", site="after")
def restore(layout: Layout, *, layer: int | None = None) -> Plan:
    """All patches again behind a layer, merged ones as copies: between a reduction and a connector.

    layer: default the last.
    """
    layer = layout.depth - 1 if layer is None else layer
    return Plan(((Site("after", layer), Restore(layout.grid)),), name="restore")
