"""Rows of results: every method on the same weights and images, at one budget."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

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
    if ratio is None and learned is not None:
        ratio = _ratio(setup, learned)
    budget: float = setup.config.evaluate.macs if ratio is None else ratio
    for name in setup.config.evaluate.methods if methods is None else methods:
        if name not in plans and keep is not None:
            plans[name] = (make_plan(name, setup.layout, keep=keep), keep)
        elif name not in plans:
            plans[name] = cost.solve_keep(setup.model, name, budget)
    return plans


def check_budget(setup: Setup) -> None:
    """Raises ValueError where a method to be compared is unknown or far from the budget."""
    rates = setup.config.rates
    learns = rates.steps and rates.unit == "ratio"
    ratio = rates.target if learns else setup.config.evaluate.macs
    for name in setup.config.evaluate.methods:
        cost.solve_keep(setup.model, name, ratio)


def _ratio(setup: Setup, plan: Plan) -> float:
    return cost.macs(setup.model, plan) / cost.macs(setup.model)


def make_rows(setup: Setup, params: Arrays, inputs: Inputs, plans: Plans) -> list[Row]:
    """A row per plan: accuracy and recall in [0, 1], MACs and milliseconds of one image.

    'recall' is None where the data has no mask. 'keep' is None for dense and for what was learned.
    Times are medians of rounds in which all plans take turns. With config.finetune.steps every
    plan is first trained for so long from the same weights.
    """
    tuned = {n: finetune(setup, params, inputs, plan) for n, (plan, _) in plans.items()}
    times = time_plans(setup, tuned, inputs, plans)
    rows = []
    for name, (plan, keep) in plans.items():
        row = {"method": name, "seed": setup.config.seed, "keep": keep}
        row |= evaluate(setup, tuned[name], inputs, plan)
        row |= {"macs": cost.macs(setup.model, plan), "macs_ratio": _ratio(setup, plan)}
        rows.append(row | {"ms": times[name], "ms_ratio": times[name] / times["dense"]})
    return rows


def evaluate(setup: Setup, params: Arrays, inputs: Inputs, plan: Plan) -> dict[str, float | None]:
    """'accuracy' and 'recall' (None without masks) of one plan over all evaluation passes."""
    step = make_eval_step(setup.skeleton, plan, setup.layout)
    key, totals = seed_key(setup.config, -1), {}
    for i, batch in enumerate(inputs.eval_batches()):
        sums = step(params, setup.rest, batch, jax.random.fold_in(key, i))
        totals = jax.tree.map(jnp.add, totals, sums) if totals else sums
    share = {name: float(value / totals["count"]) for name, value in totals.items()}
    return {"accuracy": share["correct"], "recall": share.get("recall")}


def time_plans(
    setup: Setup, params: Mapping[str, Arrays], inputs: Inputs, plans: Plans
) -> dict[str, float]:
    """Milliseconds of one image by name: forward pass of one batch, on the default device."""
    first = next(iter(inputs.eval_batches()))["image"]
    images = jnp.asarray(np.resize(first, (setup.config.evaluate.time_batch, *first.shape[1:])))
    key = seed_key(setup.config, -1)

    def call(name: str, plan: Plan) -> Callable[[], Array]:
        forward = make_forward(setup.skeleton, plan)
        return lambda: forward(params[name], setup.rest, images, key)[0]

    calls = {name: call(name, plan) for name, (plan, _) in plans.items()}
    timings = cost.time_rounds(calls, rounds=setup.config.evaluate.rounds)
    return {name: 1e3 * timing.median / len(images) for name, timing in timings.items()}


def finetune(setup: Setup, params: Arrays, inputs: Inputs, plan: Plan) -> Arrays:
    """The weights after config.finetune.steps under the plan; the same batches for every plan."""
    config = setup.config
    if not config.finetune.steps:
        return params
    objective = Objective(plan, label_smoothing=config.loss.label_smoothing)
    optimizer = {**config.optimizer, "lr": config.finetune.lr}
    stage = Stage(f"tune {plan.name}", objective, config.finetune.steps, WEIGHTS, optimizer)
    copy = jax.tree.map(jnp.copy, params)
    batches = inputs.train_batches(config.seed + len(setup.stages))
    key = seed_key(config, len(setup.stages))
    state = stage.init(copy, jax.tree.map(jnp.copy, setup.rest))
    return run_stage(stage, setup.skeleton, state, batches, key=key, progress=config.log.progress)[
        "params"
    ]


def draw(setup: Setup, params: Arrays, inputs: Inputs, plan: Plan, workdir: Path) -> None:
    """tokens.png: what the plan keeps and merges in the first test images."""
    batch = next(iter(inputs.eval_batches()))
    count = setup.config.evaluate.pictures
    images = jnp.asarray(batch["image"][:count])
    forward = make_forward(setup.skeleton, plan)
    _, report = forward(params, setup.rest, images, seed_key(setup.config, -1))
    viz.plot_tokens(
        images,
        [np.asarray(source) for source in report.sources],
        grid=setup.layout.grid,
        prefix=setup.layout.prefix,
        path=workdir / "tokens.png",
        masks=batch["mask"][:count] if "mask" in batch else None,
    )
