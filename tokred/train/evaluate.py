"""Rows of results: every method on the same weights and images, at one budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokred import cost, viz
from tokred.methods import make_plan
from tokred.plan import Plan
from tokred.train.inputs import Inputs
from tokred.train.loop import Stage, run_stage
from tokred.train.losses import Objective
from tokred.train.setup import WEIGHTS, Setup, learned_plan, seed_key
from tokred.train.state import Arrays
from tokred.train.step import make_eval_step, make_forward

Row = dict[str, Any]
Plans = dict[str, tuple[Plan, float | None]]


def choose_plans(
    setup: Setup,
    params: Arrays,
    *,
    methods: Sequence[str] | None = None,
    keep: float | None = None,
    ratio: float | None = None,
) -> Plans:
    """Plans with their keep ratio by the name of the row.

    By default: dense, what was learned, and config.evaluate.methods at the learned plan's MACs
    (config.evaluate.macs if nothing was learned). With `ratio` (MACs as a share of dense) or
    `keep` (the methods' own budget), dense and the methods at that budget; the learned method's
    plan is then made for the budget too.

    Raises:
      ValueError: both budgets, an unknown method, or a budget that it cannot reach.
    """
    if keep is not None and ratio is not None:
        raise ValueError("--keep and --macs are two budgets; give one of them.")
    learned = learned_plan(setup, params)
    plans: Plans = {"dense": (Plan(), None)}
    free = keep is None and ratio is None
    if learned is not None and free and (methods is None or learned.name in methods):
        plans[learned.name] = (learned, None)
    if ratio is None:
        ratio = setup.config.evaluate.macs if learned is None else _ratio(setup, learned)
    for name in setup.config.evaluate.methods if methods is None else methods:
        if name not in plans and keep is not None:
            plans[name] = (make_plan(name, setup.layout, keep=keep), keep)
        elif name not in plans:
            plans[name] = cost.solve_keep(setup.model, name, ratio)
    return plans


def _ratio(setup: Setup, plan: Plan) -> float:
    return cost.macs(setup.model, plan) / cost.macs(setup.model)


def make_rows(
    setup: Setup, params: Arrays, inputs: Inputs, plans: Plans, *, progress: bool = True
) -> list[Row]:
    """A row per plan: accuracy and recall in [0, 1], MACs and milliseconds of one image.

    'recall' is None where the data has no mask. 'keep' is None for dense and for what was learned.
    Times are medians of rounds in which all plans take turns. With config.finetune.steps every
    plan is first trained for so long from the same weights.
    """
    tuned = {name: finetune(setup, params, inputs, name, plan) for name, (plan, _) in plans.items()}
    batches = list(inputs.eval_batches()) if inputs.small else inputs
    times = time_plans(setup, tuned, batches, plans)
    rows = []
    for name, (plan, keep) in plans.items():
        scores = evaluate(setup, tuned[name], plan, batches)
        row = {"method": name, "seed": setup.config.seed, **scores, "keep": keep}
        row |= {"macs": cost.macs(setup.model, plan), "macs_ratio": _ratio(setup, plan)}
        rows.append(row | {"ms": times[name], "ms_ratio": times[name] / times["dense"]})
    return rows
