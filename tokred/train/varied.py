"""Plans that take turns while a model trains: lengths drawn per step, scales at once, stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from tokred.plan import Plan

RULES = ("draw", "all", "stages")
DRAW = 15_485_863  # folded into a step's key for the draw of a plan


@dataclass(frozen=True)
class Varied:
    """Which of `plans`, of the same weights, a step trains under; static.

    rule: 'draw' one per step, the same on every device and host, by `weights` (None: alike) · 'all'
    of them, the mean of their losses · 'stages' one after another: the next from each of the steps
    in `pivots` on. All programs are compiled into the one step; a step runs only what it chose, so
    that shorter plans save their time.
    """

    plans: tuple[Plan, ...]
    rule: str = "draw"
    weights: tuple[float, ...] | None = None
    pivots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"train.rule={self.rule!r} must be one of {RULES}; change it.")
        if not self.plans:
            raise ValueError("train.each is empty; give the values that train.vary takes.")
        if any(plan.init() for plan in self.plans):
            raise ValueError(
                f"train.vary: {self.plans[0].name!r} has running states, which cannot take turns; "
                "train it under one plan."
            )
        if self.weights is not None and len(self.weights) != len(self.plans):
            raise ValueError(
                f"train.weights has {len(self.weights)} numbers for {len(self.plans)} values; give "
                "one for each."
            )
        steps = list(self.pivots)
        rising = steps == sorted(set(steps)) and min(steps, default=1) >= 1
        fits = len(steps) == len(self.plans) - 1 if self.rule == "stages" else not steps
        if not (rising and fits):
            raise ValueError(
                f"train.pivots={self.pivots} must be {len(self.plans) - 1} rising steps with "
                "train.rule='stages', and none with other rules; change it."
            )

    def __call__(
        self, run: Callable[[Plan], Any], key: PRNGKeyArray, step: Int[Array, ""] | int
    ) -> Any:
        """run(plan) of the step's plan, or the mean over all; its results must be alike."""
        branches = [lambda plan=plan: run(plan) for plan in self.plans]
        if self.rule == "all":
            return jax.tree.map(lambda *a: jnp.stack(a).mean(0), *(branch() for branch in branches))
        return jax.lax.switch(self.choose(key, step), branches)

    def choose(self, key: PRNGKeyArray, step: Int[Array, ""] | int) -> Int[Array, ""]:
        """The number of the step's plan; the same for the same key on every host."""
        if self.rule == "stages":
            return (jnp.asarray(self.pivots, jnp.int32) <= step).sum()
        chances = None if self.weights is None else jnp.asarray(self.weights, jnp.float32)
        chances = None if chances is None else chances / chances.sum()
        return jax.random.choice(jax.random.fold_in(key, DRAW), len(self.plans), p=chances)


def vary_options(names: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    """Options of each plan: 'length' with (1, 2) or 'layer,stride' with ((2, 8), (16, 2))."""
    keys = names.split(",")
    rows = [(value,) if len(keys) == 1 else tuple(value) for value in values]
    for row in rows:
        if len(row) != len(keys):
            raise ValueError(f"train.each: {row} must hold one value for each of {keys}.")
    return [dict(zip(keys, row, strict=True)) for row in rows]
