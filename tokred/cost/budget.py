"""From a target in multiply-accumulates to a method's budget."""

import bisect
from collections.abc import Callable
from typing import Any

from tokred.cost.macs import Composite, Costed, macs
from tokred.methods import get_method, make_plan
from tokred.plan import Plan

STEPS = 4096  # keep is a multiple of 1 / STEPS


def solve_keep(
    config: Costed | Composite,
    method: str,
    ratio: float,
    *,
    whole: Callable[[Plan], Plan] = lambda plan: plan,
    tokens: int | None = None,
    **options: Any,
) -> tuple[Plan, float]:
    """The plan with the largest `keep` that costs at most `ratio` of the dense model; that keep.

    Counts are whole tokens, so cost is a staircase in `keep` and usually stays a little below the
    target. whole: what the method's plan is part of, which is what costs. tokens: of an example,
    see `macs`. options: the method's other ones.

    Raises:
      ValueError: a target below what the method can reach, or options that it does not take.
    """
    if "keep" in options:
        raise ValueError("solve_keep: keep is what it solves for; leave it out of the options.")
    make_plan(method, config.layout, **options)
    if "keep" not in get_method(method).options:
        raise ValueError(f"solve_keep: method {method!r} has no keep to solve for; choose another.")
    make = lambda keep: whole(make_plan(method, config.layout, keep=keep, **options))  # noqa: E731
    everything = make(1.0)
    if ratio >= 1:
        return everything, 1.0
    dense = macs(config, tokens=tokens)

    def cost(step: int) -> float:
        """Relative cost at keep = step / STEPS; below what the method can do, 0."""
        try:
            plan = make(step / STEPS)
        except ValueError:
            return 0.0
        return macs(config, plan, tokens=tokens) / dense

    steps = range(1, STEPS + 1)
    best = bisect.bisect_right(steps, ratio, key=cost)
    lowest = bisect.bisect_right(steps, 0.0, key=cost) + 1
    if best < lowest:
        raise ValueError(
            f"solve_keep: method {method!r} cannot cost {ratio:g} of the dense model; "
            f"choose a ratio in [{cost(lowest):.3f}, 1.0]."
        )
    keep = best / STEPS
    return make(keep), keep
