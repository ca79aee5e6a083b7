"""Decoders at equal training compute, under several seeds:

python -m tokred.train.isoflop --configs=configs/a.py,configs/b.py --workdir=DIR --seeds=0,1,2

The first recipe sets the budget: its steps times the MACs of a step. Every other one trains for as
many steps as the budget pays for, with its schedule stretched to them. Writes DIR/results.json and
DIR/curves.png and prints means and half ranges over the seeds; runs that are finished are only
evaluated again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokred import cost, viz
from tokred.models.generate import generate
from tokred.nn.skeleton import Weights
from tokred.plan import Plan
from tokred.train.cli import Arguments, run
from tokred.train.config import Config, load_config
from tokred.train.inputs import Inputs, make_inputs
from tokred.train.job import run_job
from tokred.train.mesh import to_mesh
from tokred.train.seeds import read_seeds
from tokred.train.setup import Setup, learned_plan, make_setup, restore_setup

Row = dict[str, Any]
STEPS = 64  # of decoding, or what half of the sequence has room for
BATCHES = (1, 16)  # of decoding


def main(argv: Sequence[str]) -> None:
    """Trains every recipe under every seed, then times them in turns."""
    parser = Arguments(description=__doc__)
    parser.add_argument(
        "--configs", dest="config", required=True, help="recipes of text, separated by commas"
    )
    parser.add_argument("--workdir", type=Path, required=True, help="where everything is written")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    args, overrides = parser.read(argv)
    recipes = args.config.split(",")
    names = [Path(recipe.partition(":")[0]).stem for recipe in recipes]
    rows: list[Row] = []
    for seed in read_seeds(args.seeds):
        for name, config in zip(names, at_equal_macs(recipes, overrides), strict=True):
            config.seed = seed
            rows.append(train_row(name, config, args.workdir / name / f"seed_{seed}"))
    first = [args.workdir / name / f"seed_{read_seeds(args.seeds)[0]}" for name in names]
    times = time_recipes(dict(zip(names, first, strict=True)), args.rounds)
    rows = [row | times[row["method"]] for row in rows]
    (args.workdir / "results.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    viz.plot_curves(rows, args.workdir / "curves.png")
    print(viz.format_table(rows, COLUMNS))


COLUMNS = (
    "params", "steps", "train_macs", "loss", "bits_per_byte", "causal_bits_per_byte", "agreement",
    "macs_ratio", "step_ms", *(f"decode_ms_{batch}" for batch in BATCHES),
)  # fmt: skip


def at_equal_macs(recipes: Sequence[str], overrides: Sequence[str]) -> list[Config]:
    """The configs of the recipes, with steps that cost what those of the first one cost.

    Raises:
      ValueError: a recipe that is not of text.
    """
    configs = [load_config(recipe, overrides) for recipe in recipes]
    budget = step_macs(configs[0]) * configs[0].train.steps
    for config in configs[1:]:
        config.train.steps = max(1, round(budget / step_macs(config)))
    return configs


def step_macs(config: Config) -> int:
    """Of one training step: the backward pass counts twice the forward pass."""
    if config.task != "text":
        raise ValueError(
            f"isoflop: config.task={config.task!r}, but it compares decoders on text; use recipes "
            "such as configs/lm_bytes_dense.py."
        )
    setup = make_setup(config)
    plan = setup.stages[0].objective.plan
    return 3 * config.data.batch * cost.macs(setup.model, plan, tokens=setup.tokens)


def train_row(name: str, config: Config, workdir: Path) -> Row:
    """Trains, or goes on, and evaluates: the scores of the method that was trained."""
    rows = {row["method"]: row for row in run_job(config, workdir)}
    method = config.train.method
    row = {**rows[method], "method": name, "steps": config.train.steps}
    causal = rows.get(f"{method} causal", {})
    row["causal_bits_per_byte"] = causal.get("bits_per_byte")
    _, weights = restore_setup(workdir)
    row["params"] = sum(x.size for x in jax.tree.leaves(weights.params))
    row["train_macs"] = step_macs(config) * config.train.steps
    row["curve"] = read_curve(workdir, step_macs(config))
    return row


def read_curve(workdir: Path, macs: int) -> list[tuple[float, float]]:
    """(MACs spent, training loss on the next token) of every line of the log."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        (line["step"] * macs, line.get("cross_entropy", line["loss"]))
        for line in lines
        if line["stage"] == "train"
    ]


def time_recipes(workdirs: Mapping[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step and of a decoded token, all recipes in turns."""
    calls: dict[str, Callable[[], Any]] = {}
    per_call: dict[str, int] = {}
    for name, workdir in workdirs.items():
        setup, weights = restore_setup(workdir)
        inputs = make_inputs(setup.config, setup.model, setup.mesh)
        calls[f"{name} step_ms"] = step_call(setup, weights, inputs)
        per_call[f"{name} step_ms"] = 1
        plan = learned_plan(setup, weights.params) or Plan()
        if all(reduction.decides for _, reduction in plan.steps):
            for batch in BATCHES:
                label = f"{name} decode_ms_{batch}"
                calls[label], per_call[label] = decode_call(setup, weights, inputs, batch, plan)
    timings = cost.time_rounds(calls, rounds)
    times: dict[str, dict[str, Any]] = {name: dict.fromkeys(COLUMNS[-3:]) for name in workdirs}
    for label, timing in timings.items():
        name, field = label.rsplit(" ", 1)
        times[name][field] = 1e3 * timing.median / per_call[label]
    return times


def step_call(setup: Setup, weights: Weights, inputs: Inputs) -> Callable[[], Any]:
    """One step of training on one batch, again and again."""
    stage, state = setup.stages[0], setup.start(0, weights)
    step = stage.make_step(setup.skeleton, state, setup.mesh, setup.rules)
    batch = next(inputs.train_batches(0))
    rows = to_mesh({name: batch[name] for name in stage.objective.fields}, setup.mesh)
    held = [state]

    def call() -> Any:
        with jax.set_mesh(setup.mesh):
            held[0], metrics = step(held[0], rows, setup.frozen)
        return metrics

    return call


def decode_call(
    setup: Setup, weights: Weights, inputs: Inputs, batch: int, plan: Plan
) -> tuple[Callable[[], Any], int]:
    """(continues the first halves of test sequences, by how many tokens)."""
    rows = next(iter(inputs.eval_batches()))["input"]
    half = rows.shape[1] // 2
    prompt, steps = jnp.asarray(rows[np.arange(batch) % len(rows), :half]), min(STEPS, half)

    @jax.jit
    def decode(weights: Weights, prompt: jax.Array) -> jax.Array:
        return generate(setup.skeleton.merge(*weights), prompt, steps=steps, plan=plan).ids

    return lambda: decode(weights, prompt), steps


if __name__ == "__main__":
    run(main)
