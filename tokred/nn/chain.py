"""Small stacks of layers by their names, for what stands before and behind attention."""

import itertools
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from tokred.nn.mlp import activate

ACTS = ("gelu", "relu", "silu")
LAYERS = ("norm", "linear", "bare", *ACTS)


def as_input(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """For the promote_dtype= of layers: weights as precise as what comes in, not the other way."""
    kind = arrays[0].dtype if dtype is None else dtype
    return tuple(None if a is None else a.astype(kind) for a in arrays)


class Chain(nnx.Module):
    """Layers one after another, named in a line such as 'linear gelu linear norm'.

    'norm' LayerNorm · 'linear' · 'bare' linear without bias · activations of `ACTS`; '' is the
    identity. The last linear gives `out` channels, those before it `hidden` (default `out`);
    without a linear, `out` must be `width`.

    Raises:
      ValueError: an unknown layer, or an `out` that no layer gives.
    """

    def __init__(
        self,
        names: str,
        width: int,
        out: int | None = None,
        *,
        hidden: int | None = None,
        eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        words = names.split()
        for word in words:
            if word not in LAYERS:
                raise ValueError(f"Chain: {word!r} in {names!r} must be one of {LAYERS}.")
        linears = [i for i, word in enumerate(words) if word in ("linear", "bare")]
        out = width if out is None else out
        if not linears and out != width:
            raise ValueError(
                f"Chain: {names!r} has no linear layer to bring {width} channels to {out}; add one."
            )
        layers = []
        for i, word in enumerate(words):
            if word in ACTS:
                layers.append(None)
                continue
            if word == "norm":
                layers.append(nnx.LayerNorm(width, epsilon=eps, rngs=rngs))
                continue
            to = out if i == linears[-1] else hidden or out
            biased = word == "linear"
            layers.append(nnx.Linear(width, to, use_bias=biased, promote_dtype=as_input, rngs=rngs))
            width = to
        self.words, self.out = tuple(words), out
        self.layers = nnx.List([layer for layer in layers if layer is not None])

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N C"]:
        layers, kind = iter(self.layers), x.dtype
        for word in self.words:
            x = activate(x, word) if word in ACTS else next(layers)(x).astype(kind)
        return x


def grown(names: str, width: int, out: int) -> int:
    """The channels behind a chain whose linear layers, if it has any, lead to `out`."""
    return out if any(word in ("linear", "bare") for word in names.split()) else width


def linears(chain: Chain) -> list[nnx.Linear]:
    """Those of its layers."""
    return [layer for layer in chain.layers if isinstance(layer, nnx.Linear)]


def chain_macs(names: str, width: int, out: int, hidden: int | None = None) -> int:
    """Multiply-accumulates of one token."""
    count = sum(word in ("linear", "bare") for word in names.split())
    sides = [width, *([hidden or out] * (count - 1)), out] if count else []
    return sum(a * b for a, b in itertools.pairwise(sides))


class NormedGate(nnx.Module):
    """w2(norm(silu(w1 x) * w3 x)), all with biases: the gated perceptron of DocCompressor."""

    def __init__(self, width: int, hidden: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, promote_dtype=as_input, rngs=rngs)
        self.w1, self.w3 = linear(width, hidden), linear(width, hidden)
        self.norm = nnx.LayerNorm(hidden, epsilon=eps, rngs=rngs)
        self.w2 = linear(hidden, width)

    def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N D"]:
        y = self.norm(jax.nn.silu(self.w1(x)) * self.w3(x)).astype(x.dtype)
        return self.w2(y)
