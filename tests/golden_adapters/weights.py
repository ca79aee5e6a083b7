"""Weights under their official torch names into tokred's modules."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)

# Official name -> ours, tried in order on whole path components.
NAMES = {
    r"pos_embed": "position",
    r"cls_token": "cls",
    r"patch_embed\.proj": "embed.conv",
    r"arch_block(\d+)_(prune|merge)": r"reductions.mid_\1.\2",
    r"proj\.": "out.",
    r"in_conv\.0": "norm",
    r"in_conv\.1": "embed",
    r"out_conv\.0": "fc1",
    r"out_conv\.2": "fc2",
    r"out_conv\.4": "fc3",
    r"embed\.conv": "embed.proj",
}


def fill(make: Callable[[], Module], params: Mapping[str, Any], prefix: str = "") -> Module:
    """The module of `make` with the weights whose names start with `prefix`.

    Raises KeyError for a parameter without a weight.
    """
    graph, state = nnx.split(nnx.eval_shape(make))
    weights = _ours({k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)})

    flat = [
        (path, leaf.replace(jnp.asarray(weights[".".join(map(str, path))]).reshape(leaf.shape)))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _ours(params: Mapping[str, Any]) -> dict[str, Any]:
    weights = {}
    for name, value in params.items():
        for official, ours in NAMES.items():
            name = re.sub(rf"(?:^|(?<=\.)){official}", ours, name)
        if "qkv." in name:
            parts = zip(("query", "key", "value"), jnp.split(value, 3), strict=True)
            weights |= dict(_leaf(name.replace("qkv", part), rows) for part, rows in parts)
        else:
            weights |= dict([_leaf(name, value)])
    return weights


def _leaf(name: str, value: Any) -> tuple[str, Any]:
    """torch: Linear (out, in), Conv (out, in, y, x), the scale of a norm is its weight."""
    if not name.endswith(".weight"):
        return name, value
    if value.ndim == 1:
        return name.replace(".weight", ".scale"), value
    order = (1, 0) if value.ndim == 2 else (2, 3, 1, 0)
    return name.replace(".weight", ".kernel"), jnp.transpose(value, order)


def mlp_ratio(params: Mapping[str, Any], prefix: str = "") -> float:
    hidden, width = params[f"{prefix}mlp.fc1.weight"].shape
    return hidden / width


def depth(params: Mapping[str, Any]) -> int:
    return len({name.split(".")[1] for name in params if name.startswith("blocks.")})
