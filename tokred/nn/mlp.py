"""The perceptrons of transformer blocks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# ViTs name their GELU alone.
GELUS = {"exact": "gelu", "tanh": "gelu_tanh", "quick": "gelu_quick"}
ACTIVATIONS = ("silu", "relu", *GELUS.values())


def activate(x: Float[Array, "..."], kind: str) -> Float[Array, "..."]:
    """An activation by name: 'gelu' (erf, as timm and torch), 'gelu_tanh' (as big_vision and
    GPT-2), 'gelu_quick' (x sigmoid(1.702 x), as CLIP), 'silu' or 'relu'."""
    match kind:
        case "silu":
            return jax.nn.silu(x)
        case "relu":
            return jax.nn.relu(x)
        case "gelu_quick":
            return x * jax.nn.sigmoid(1.702 * x)
        case "gelu" | "gelu_tanh":
            return jax.nn.gelu(x, approximate=kind == "gelu_tanh")
    raise ValueError(f"activation={kind!r} must be one of {ACTIVATIONS}; change it.")


class Mlp(nnx.Module):
    """Linear, activation (one of `ACTIVATIONS`), Linear to `out` channels, None for as many as came
    in."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        out: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
        dtype: Any = None,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        common = {"use_bias": bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = nnx.Linear(width, hidden, **common)
        self.fc2 = nnx.Linear(hidden, width if out is None else out, **common)

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N C"]:
        return self.fc2(activate(self.fc1(x), self.activation))


class GatedMlp(nnx.Module):
    """down(act(gate x) * up x), by default without biases; activation: one of `ACTIVATIONS`."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"use_bias": bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.activation = activation
        self.gate = nnx.Linear(width, hidden, **common)
        self.up = nnx.Linear(width, hidden, **common)
        self.down = nnx.Linear(hidden, width, **common)

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N D"]:
        return self.down(activate(self.gate(x), self.activation) * self.up(x))
