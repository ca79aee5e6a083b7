"""Models as flat dicts of arrays by path, and the state of a training run.

A path is such as 'blocks/0/attn/query/kernel'. The train state is a plain dict: 'params' and
'rest' (arrays by path), 'ema' (averages of what trains, perhaps none), 'opt' (the optimizer's, for
what trains), 'controllers' (running states of reductions by site), 'key' (of all draws), 'step'
(int32 []) and 'fault' (int32 [], 0 as long as all numbers were finite).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

Arrays = dict[str, Array]
State = dict[str, Any]


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


def select_names(
    params: Mapping[str, Any], pattern: str, field: str = "trainable"
) -> tuple[str, ...]:
    """Paths in which the regular expression, from a config's field, is found; '' finds all.

    Raises:
      ValueError: the pattern is no regular expression, or fits no path.
    """
    try:
        found = tuple(name for name in params if re.search(pattern, name))
    except re.error as error:
        raise ValueError(
            f"{field}={pattern!r} is no regular expression ({error}); correct the pattern."
        ) from None
    if not found:
        raise ValueError(
            f"{field}={pattern!r} fits none of {len(params)} parameters such as "
            f"{next(iter(params), 'none')!r}; change the pattern."
        )
    return found


def init_state(
    weights: Weights,
    tx: optax.GradientTransformation,
    trainable: Sequence[str],
    *,
    key: PRNGKeyArray | None = None,
    controllers: Mapping[str, Any] | None = None,
    ema: bool = False,
) -> State:
    """The train state at step 0; parameters outside `trainable` get no optimizer state."""
    learned = {name: weights.params[name] for name in trainable}
    return {
        "params": weights.params,
        "rest": weights.rest,
        "ema": jax.tree.map(jnp.copy, learned) if ema else {},
        "opt": tx.init(learned),
        "controllers": dict(controllers or {}),
        "key": jax.random.key(0) if key is None else key,
        "step": jnp.zeros((), jnp.int32),
        "fault": jnp.zeros((), jnp.int32),
    }


def result(state: State) -> Weights:
    """What training gives: averaged parameters where averages are kept."""
    return Weights({**state["params"], **state["ema"]}, state["rest"])


def born_sharded(make: Callable[..., Any], shardings: Any, *args: Any) -> Any:
    """make(*args), compiled so that no leaf ever exists in one piece."""
    return jax.jit(make, out_shardings=shardings)(*args)
