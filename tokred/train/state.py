"""Models as flat dicts of arrays by path, what of them trains, and the optimizer.

A path is such as 'blocks/0/attn/query/kernel'. The train state is a plain dict: 'params' and
'rest' (arrays by path), 'opt' (the optimizer's, for what trains) and 'step' (int32 []).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

Arrays = dict[str, Array]
State = dict[str, Any]


@dataclass(frozen=True)
class Skeleton:
    """A model without its arrays; static and hashable."""

    graph: Any
    params: Any  # tree definitions
    rest: Any
    names: tuple[tuple[str, ...], tuple[str, ...]]

    def merge(self, params: Mapping[str, Array], rest: Mapping[str, Array]) -> Any:
        """The model with these arrays; under a transformation too."""
        trees = (
            jax.tree.unflatten(tree, [arrays[name] for name in names])
            for tree, arrays, names in zip(
                (self.params, self.rest), (params, rest), self.names, strict=True
            )
        )
        return nnx.merge(self.graph, *trees)


def split_model(model: nnx.Module) -> tuple[Skeleton, Arrays, Arrays]:
    """The skeleton, the parameters and all other arrays, both by path."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    flat, trees, names = [], [], []
    for tree in (params, rest):
        leaves, definition = jax.tree_util.tree_flatten_with_path(tree)
        flat.append({path_name(path): leaf for path, leaf in leaves})
        trees.append(definition)
        names.append(tuple(flat[-1]))
    skeleton = Skeleton(graph, trees[0], trees[1], (names[0], names[1]))
    return skeleton, flat[0], flat[1]


def path_name(path: Sequence[Any]) -> str:
    """'a/0/b' of a tree path; the 'value' that NNX appends is left out."""
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
    return "/".join(parts[:-1] if parts[-1] == "value" else parts)


def select_names(params: Mapping[str, Any], pattern: str) -> tuple[str, ...]:
    """Paths in which the regular expression is found; '' finds all.

    Raises:
      ValueError: the pattern is no regular expression, or fits no path.
    """
    try:
        found = tuple(name for name in params if re.search(pattern, name))
    except re.error as error:
        raise ValueError(
            f"trainable={pattern!r} is no regular expression ({error}); correct the pattern."
        ) from None
    if not found:
        raise ValueError(
            f"trainable={pattern!r} fits none of {len(params)} parameters such as "
            f"{next(iter(params), 'none')!r}; change the pattern."
        )
    return found


def decays(params: Mapping[str, Any]) -> dict[str, bool]:
    """Whether weight decay acts: on kernels only, not on positions, tokens, norms or rates."""
    return {name: name.endswith("kernel") and p.ndim >= 2 for name, p in params.items()}


def make_optimizer(
    *,
    lr: float,
    steps: int,
    warmup: float = 0.1,
    schedule: str = "cosine",
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm; the rate warms up, then falls to 0 or stays.

    warmup: share of `steps`. schedule: 'cosine' | 'constant'. Raises ValueError for numbers out of
    range.
    """
    if not (lr > 0 and steps >= 1 and 0 <= warmup < 1 and clip > 0):
        raise ValueError(
            f"optimizer: needs lr > 0, steps >= 1, 0 <= warmup < 1 and clip > 0, got lr={lr}, "
            f"steps={steps}, warmup={warmup}, clip={clip}; change these fields."
        )
    rate = make_schedule(lr, steps, round(warmup * steps), schedule)
    adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)


def make_schedule(lr: float, steps: int, warmup: int, schedule: str) -> optax.Schedule:
    """Learning rate by step. Raises ValueError for an unknown schedule."""
    if schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else lr, lr, warmup, steps)
    if schedule == "constant":
        return optax.linear_schedule(0.0 if warmup else lr, lr, max(warmup, 1))
    raise ValueError(f"optimizer.schedule={schedule!r} must be 'cosine' or 'constant'; change it.")


def init_state(
    params: Arrays, rest: Arrays, tx: optax.GradientTransformation, trainable: Sequence[str]
) -> State:
    """The train state at step 0; parameters outside `trainable` get no optimizer state."""
    opt = tx.init({name: params[name] for name in trainable})
    return {"params": params, "rest": rest, "opt": opt, "step": jnp.zeros((), jnp.int32)}
