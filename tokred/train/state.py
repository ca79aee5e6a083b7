"""The state of a training run.

The train state is a plain dict: 'params' and 'rest' (arrays by path), 'ema' (averages of what
trains, perhaps none), 'opt' (the optimizer's, for what trains), 'controllers' (running states of
reductions by site), 'key' (of all draws), 'step' (int32 []) and 'fault' (int32 [], 0 as long as all
numbers were finite).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from tokred.nn.skeleton import Weights

State = dict[str, Any]


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
