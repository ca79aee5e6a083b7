"""The two-layer perceptron of a transformer block."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float


def gelu(x: Float[Array, "..."], kind: str) -> Float[Array, "..."]:
    """GELU by name: 'exact' (erf, as timm and torch) or 'tanh' (as big_vision and GPT-2)."""
    if kind not in ("exact", "tanh"):
        raise ValueError(f"gelu={kind!r} must be 'exact' or 'tanh'.")
    return jax.nn.gelu(x, approximate=kind == "tanh")


class Mlp(nnx.Module):
    """Linear, GELU, Linear."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        kind: str = "exact",
        dtype: Any = None,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.kind = kind
        self.fc1 = nnx.Linear(width, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N D"]:
        return self.fc2(gelu(self.fc1(x), self.kind))
