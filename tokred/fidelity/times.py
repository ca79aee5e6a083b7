"""Programs of reduced models side by side: what they give, and how long they take."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tokred.cost import Timing, time_rounds
from tokred.fidelity.choose import Candidate
from tokred.nn.skeleton import split_model
from tokred.plan import Plan
from tokred.report import Call

Program = Callable[[], Any]


def program(
    model: Any, plan: Plan, see: Callable[..., Any], *inputs: Any, seed: int = 0
) -> Program:
    """see(model, *inputs, plan=, call=), compiled; draws come from `seed`."""
    skeleton, weights = split_model(model)

    def run(params: Any, rest: Any, key: Any, *inputs: Any) -> Any:
        return see(skeleton.merge(params, rest), *inputs, plan=plan, call=Call(key=key))

    compiled = jax.jit(run)
    key = jax.random.key(seed)
    return lambda: compiled(weights.params, weights.rest, key, *inputs)


def side_by_side(
    model: Any,
    found: Sequence[Candidate],
    see: Callable[..., Any],
    inputs: Any,
    agree: Callable[[Any, Any], dict[str, Any]],
    rounds: int,
) -> dict[Candidate, dict[str, Any]]:
    """For every plan that is within reach, how what `program` gives agrees with what the first
    gives, agree(given, first), and how long it takes for one of the inputs."""
    programs = {c: program(model, c.plan, see, inputs) for c in found if c.plan is not None}
    seen = {c: jax.tree.map(np.asarray, run()) for c, run in programs.items()}
    times = timed(programs, rounds, per=len(inputs))
    return {c: agree(seen[c], seen[found[0]]) | times[c] for c in programs}


def timed(
    programs: Mapping[Any, Program], rounds: int, per: int = 1, warmup: int = 1
) -> dict[Any, dict[str, Any]]:
    """ms (median), ms_low, ms_high of each, per so many things that it does, taking turns after
    `warmup` runs of each; ms_ratio to the first."""
    times: Mapping[Any, Timing] = time_rounds(programs, rounds, warmup)
    dense = next(iter(times.values())).median
    return {
        name: {
            "ms": 1e3 * t.median / per,
            "ms_low": 1e3 * t.low / per,
            "ms_high": 1e3 * t.high / per,
            "ms_ratio": t.median / dense,
        }
        for name, t in times.items()
    }
