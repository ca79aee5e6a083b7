"""The perceptrons of transformer blocks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def gelu(x: Float[Array, "..."], kind: str) -> Float[Array, "..."]:
    """GELU by name: 'exact' (erf, as timm and torch) or 'tanh' (as big_vision and GPT-2)."""
    if kind not in ("exact", "tanh"):
        raise ValueError(f"gelu={kind!r} must be 'exact' or 'tanh'.")
    return jax.nn.gelu(x, approximate=kind == "tanh")


class Mlp(nnx.Module):
    """Linear, GELU, Linear to `out` channels, None for as many as came in."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        out: int | None = None,
        kind: str = "exact",
        dtype: Any = None,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.kind = kind
        out = width if out is None else out
        self.fc1 = nnx.Linear(width, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, out, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N C"]:
        return self.fc2(gelu(self.fc1(x), self.kind))


def activate(x: Float[Array, "..."], kind: str) -> Float[Array, "..."]:
    """An activation by name, one of `ACTIVATIONS`."""
    if kind == "silu":
        return jax.nn.silu(x)
    return gelu(x, "tanh" if kind == "gelu_tanh" else "exact")


class GatedMlp(nnx.Module):
    """down(act(gate x) * up x), without biases; activation: one of `ACTIVATIONS`."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str = "silu",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.activation = activation
        self.gate = nnx.Linear(width, hidden, **common)
        self.up = nnx.Linear(width, hidden, **common)
        self.down = nnx.Linear(hidden, width, **common)

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N D"]:
        return self.down(activate(self.gate(x), self.activation) * self.up(x))
