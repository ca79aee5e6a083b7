"""Models as flat dicts of arrays by path, such as 'blocks/0/attn/query/kernel'."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array

Arrays = dict[str, Array]


class Weights(NamedTuple):
    """All arrays of a model, or their shapes: parameters and the rest, by path."""

    params: Arrays
    rest: Arrays


@dataclass(frozen=True)
class Skeleton:
    """A model without its arrays; static and hashable."""

    graph: Any
    params: Any  # tree definitions
    rest: Any
    names: tuple[tuple[str, ...], tuple[str, ...]]

    def merge(self, params: Mapping[str, Any], rest: Mapping[str, Any]) -> Any:
        """The model with these arrays or shapes; under a transformation too."""
        trees = (
            jax.tree.unflatten(tree, [arrays[name] for name in names])
            for tree, arrays, names in zip(
                (self.params, self.rest), (params, rest), self.names, strict=True
            )
        )
        return nnx.merge(self.graph, *trees)


def split_model(model: nnx.Module) -> tuple[Skeleton, Weights]:
    """The skeleton and the arrays; of a model of shapes too."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    flat, trees, names = [], [], []
    for tree in (params, rest):
        leaves, definition = jax.tree_util.tree_flatten_with_path(tree)
        flat.append({path_name(path): leaf for path, leaf in leaves})
        trees.append(definition)
        names.append(tuple(flat[-1]))
    skeleton = Skeleton(graph, trees[0], trees[1], (names[0], names[1]))
    return skeleton, Weights(*flat)


def path_name(path: Sequence[Any]) -> str:
    """'a/0/b' of a tree path; the 'value' that NNX appends is left out."""
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
    return "/".join(parts[:-1] if parts[-1:] == ["value"] else parts)


def by_path(tree: Any) -> dict[str, Any]:
    """All leaves of a tree by path: arrays, or their shapes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}
