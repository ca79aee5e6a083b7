"""Rows of results: every method on the same weights and images, at one budget."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tokred import cost, viz
from tokred.methods import get_method
from tokred.nn.skeleton import Arrays, Weights
from tokred.plan import Plan
from tokred.train.inputs import Inputs
from tokred.train.loop import Around, Stage, run_stage
from tokred.train.mesh import round_up, to_mesh
from tokred.train.processes import is_main, to_host
from tokred.train.setup import WEIGHTS, Setup, learned_plan
from tokred.train.state import result
from tokred.train.step import make_eval_step, make_forward
from tokred.train.text import bits_per_byte

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
        if any(reduction.decides for _, reduction in learned.steps):
            plans[f"{learned.name} causal"] = (learned.with_twin("causal"), None)
        if get_method(learned.name).count == "data-dependent":  # slots may overflow
            plans[f"{learned.name} soft"] = (learned.with_twin("soft"), None)
    if ratio is None and learned is not None:
        ratio = macs_ratio(setup, learned)
    budget: float = setup.config.evaluate.macs if ratio is None else ratio
    for name in setup.config.evaluate.methods if methods is None else methods:
        if name not in plans and keep is not None:
            plans[name] = (setup.plan(name, keep=keep), keep)
        elif name not in plans:
            plans[name] = _solved(setup, name, budget)
    return plans


def check_budget(setup: Setup) -> None:
    """Raises ValueError where a method to be compared is unknown or far from the budget."""
    rates = setup.config.rates
    learns = rates.steps and rates.unit == "ratio"
    ratio = rates.target if learns else setup.config.evaluate.macs
    for name in setup.config.evaluate.methods:
        _solved(setup, name, ratio)


def _solved(setup: Setup, method: str, ratio: float) -> tuple[Plan, float]:
    whole, tokens = setup.beside, setup.tokens
    return cost.solve_keep(setup.model, method, ratio, whole=whole, tokens=tokens)


def macs_ratio(setup: Setup, plan: Plan) -> float:
    """MACs of an example as a share of the dense model's."""
    return _macs(setup, plan) / _macs(setup, Plan())


def _macs(setup: Setup, plan: Plan) -> int:
    return cost.macs(setup.model, plan, tokens=setup.tokens)


def make_rows(setup: Setup, weights: Weights, inputs: Inputs, plans: Plans) -> list[Row]:
    """A row per plan: the scores of the task (`Objective.scores`), MACs and milliseconds of one
    example.

    'recall' is None where the data has no mask, 'bits_per_byte' stands beside a loss on text.
    'keep' is None for dense and for what was learned. Times are medians of rounds in which all
    plans take turns. With config.finetune.steps every plan is first trained for so long from the
    same weights.
    """
    tuned = {n: finetune(setup, weights, inputs, plan) for n, (plan, _) in plans.items()}
    times = time_plans(setup, tuned, inputs, plans)
    rows = []
    for name, (plan, keep) in plans.items():
        row = {"method": name, "seed": setup.config.seed, "keep": keep}
        row |= make_evaluator(setup, inputs, plan)(tuned[name])
        row |= {"macs": _macs(setup, plan), "macs_ratio": macs_ratio(setup, plan)}
        rows.append(row | {"ms": times[name], "ms_ratio": times[name] / times["dense"]})
    return rows


def make_evaluator(
    setup: Setup, inputs: Inputs, plan: Plan
) -> Callable[[Weights], dict[str, float | None]]:
    """weights -> the scores of a plan over all evaluation passes; compiled once."""
    objective = setup.objective(plan)
    step = make_eval_step(setup.skeleton, objective, setup.layout)
    key = setup.eval_key()

    def evaluate(weights: Weights) -> dict[str, float | None]:
        totals = {}
        for i, batch in enumerate(inputs.eval_batches()):
            rows = to_mesh({name: v for name, v in batch.items() if name != "id"}, setup.mesh)
            with jax.set_mesh(setup.mesh):
                sums = step(weights, rows, jax.random.fold_in(key, i))
            totals = jax.tree.map(jnp.add, totals, sums) if totals else sums
        share = {name: float(value / totals["count"]) for name, value in totals.items()}
        scores = objective.scores(share)
        if inputs.bytes_per_token is not None:
            loss = scores["loss"] or 0.0
            scores["bits_per_byte"] = bits_per_byte(loss, inputs.bytes_per_token)
        return scores

    return evaluate


def time_plans(
    setup: Setup, weights: Mapping[str, Weights], inputs: Inputs, plans: Plans
) -> dict[str, float]:
    """Milliseconds of one example by name: logits of one batch, spread over the mesh."""
    mesh, first = setup.mesh, next(iter(inputs.eval_batches()))
    rows = round_up(mesh, setup.config.evaluate.time_batch) // inputs.count
    fields = setup.objective(Plan()).fields
    batch = to_mesh({f: np.resize(first[f], (rows, *first[f].shape[1:])) for f in fields}, mesh)
    key = setup.eval_key()

    def call(name: str, plan: Plan) -> Callable[[], Array]:
        forward = make_forward(setup.skeleton, setup.objective(plan), lambda logits, _: logits)
        return lambda: forward(weights[name], batch, key)

    calls = {name: call(name, plan) for name, (plan, _) in plans.items()}
    with jax.set_mesh(mesh):
        timings = cost.time_rounds(calls, rounds=setup.config.evaluate.rounds)
    return {name: 1e3 * timing.median / len(batch[fields[0]]) for name, timing in timings.items()}


def finetune(setup: Setup, weights: Weights, inputs: Inputs, plan: Plan) -> Weights:
    """The weights after config.finetune.steps under the plan; the same batches for every plan."""
    config = setup.config
    if not config.finetune.steps:
        return weights
    optimizer = {k: v for k, v in config.optimizer.items() if k not in ("ema", "accumulate")}
    stage = Stage(
        f"tune {plan.name}",
        setup.objective(plan),
        config.finetune.steps,
        WEIGHTS,
        {**optimizer, "lr": config.finetune.lr},
        config.optimizer.accumulate,
    )
    more = dataclasses.replace(setup, stages=(*setup.stages, stage))
    number = len(setup.stages)
    state = run_stage(
        stage,
        setup.skeleton,
        more.start(number, weights),
        inputs.train_batches(config.seed + number),
        mesh=setup.mesh,
        rules=setup.rules,
        around=Around(progress=config.log.progress and is_main()),
    )
    return result(state)


def draw(setup: Setup, weights: Weights, inputs: Inputs, plan: Plan, workdir: Path) -> None:
    """What the plan does with the first test examples: tokens.png, of text routing.html, of an
    encoder-decoder deletion.html; of answers about images nothing."""
    if setup.config.task == "talk":
        return
    rows = to_mesh(next(iter(inputs.eval_batches())), setup.mesh)
    mine = lambda report: report.parts.get("", report)  # noqa: E731
    take = lambda _, report: (report.sources, mine(report).entered)  # noqa: E731
    forward = make_forward(setup.skeleton, setup.objective(plan), take)
    with jax.set_mesh(setup.mesh):
        sources, routed = forward(weights, rows, setup.eval_key())
    rows, sources, routed = to_host((dict(rows), sources, routed))
    if not is_main():
        return
    count = setup.config.evaluate.pictures
    if setup.config.task == "text":
        texts = [inputs.pieces(ids) for ids in rows["input"][:count]]
        viz.write_routing(texts, {k: v[:count] for k, v in routed.items()}, workdir)
        return
    if setup.config.task == "seq2seq":
        for kept in list(routed.values())[-1:]:
            ids, valid = np.asarray(rows["input"]), np.asarray(rows["input_valid"])
            names = setup.config.data.languages
            labels = [names[i] for i in np.asarray(rows["language"])] if names else None
            viz.write_deletion(ids, ~np.asarray(kept) & valid, valid, workdir, labels, shown=count)
        return
    viz.plot_tokens(
        jnp.asarray(rows["image"][:count]),
        [source[:count] for source in sources],
        grid=setup.layout.grid,
        prefix=setup.layout.prefix,
        path=workdir / "tokens.png",
        masks=rows["mask"][:count] if "mask" in rows else None,
    )
