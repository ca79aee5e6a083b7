"""The main job: train, learn the rates, compare the methods at equal cost, write what came out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from tokred import viz
from tokred.data.pipeline import Batches
from tokred.train.checkpoint import Checkpoints
from tokred.train.config import Config, from_json, to_json
from tokred.train.evaluate import Row, check_budget, choose_plans, draw, make_rows
from tokred.train.inputs import Inputs, make_inputs
from tokred.train.log import RunLog
from tokred.train.loop import run_stage
from tokred.train.setup import Setup, learned_plan, make_setup, seed_key
from tokred.train.state import Arrays, State

TRAINS = ("seed", "model", "data", "train", "optimizer", "loss", "rates")  # not to change midway


def run_job(config: Config, workdir: Path) -> list[Row]:
    """Trains in `workdir`, or goes on from the last checkpoint there, and evaluates.

    Writes checkpoints/, metrics.jsonl, results.json, pareto.png and tokens.png; returns the rows
    of results.json: see `evaluate.make_rows`.

    Raises:
      ValueError: a config that does not fit, or a workdir with a run of another config.
    """
    setup = make_setup(config)
    check_budget(setup)
    inputs = make_inputs(config, setup.model)
    params = train(setup, inputs, workdir)
    rows = make_rows(setup, params, inputs, choose_plans(setup, params))
    learned = learned_plan(setup, params)
    write_results(workdir / "results.json", rows, config)
    viz.plot_pareto(rows, workdir / "pareto.png")
    plans = choose_plans(setup, params, methods=() if learned is None else (learned.name,))
    draw(setup, params, inputs, [*plans.values()][-1][0], workdir)
    return rows


def train(setup: Setup, inputs: Inputs, workdir: Path) -> Arrays:
    """The parameters after all stages; stages that `workdir` holds already are not repeated."""
    config = setup.config
    with (
        Checkpoints(workdir) as checkpoints,
        RunLog(workdir, tensorboard=config.log.tensorboard) as log,
    ):
        params, number, state, draws = resume(setup, checkpoints)
        for i, stage in enumerate(setup.stages[number:], number):
            batches = inputs.train_batches(config.seed + i)
            if draws is not None:
                batches.set_state(draws)
            state = stage.init(params, setup.rest) if state is None else state
            state = run_stage(
                stage,
                setup.skeleton,
                state,
                batches,
                key=seed_key(config, i),
                log=log,
                every=config.log.every,
                save=saver(setup, checkpoints, i),
                save_every=config.log.save_every,
                progress=config.log.progress,
            )
            params, state, draws = state["params"], None, None
        return params


def saver(setup: Setup, checkpoints: Checkpoints, number: int) -> Any:
    """A function that stores the state and the place in the data of stage `number`."""
    before = sum(stage.steps for stage in setup.stages[:number])

    def save(state: State, batches: Batches) -> None:
        about = {"config": to_json(setup.config), "stage": number, "data": batches.get_state()}
        checkpoints.save(before + int(state["step"]), state, about)

    return save


def resume(
    setup: Setup, checkpoints: Checkpoints
) -> tuple[Arrays, int, State | None, dict[str, Any] | None]:
    """(parameters, number of the stage, its state, place in the data) to go on from.

    Raises:
      ValueError: the checkpoint is of another config, or damaged.
    """
    if checkpoints.latest is None:
        return setup.params, 0, None, None
    about = checkpoints.about()
    require_same(to_json(setup.config), about["config"])
    params, rest = checkpoints.model(setup.params, setup.rest)
    number = about["stage"]
    start = setup.stages[number].init(params, rest)
    state = {**start, **checkpoints.train(start["opt"])}
    if int(state["step"]) >= setup.stages[number].steps:
        return params, number + 1, None, None
    return params, number, state, about["data"]


def require_same(config: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first field of the training that differs."""
    for section in TRAINS:
        mine, theirs = _flat(config[section], section), _flat(stored.get(section), section)
        for name in [*mine, *theirs]:
            if mine.get(name) != theirs.get(name):
                raise ValueError(
                    f"workdir holds a run with config.{name}={theirs.get(name)!r}, this one has "
                    f"{mine.get(name)!r}; use another --workdir, or the same config to go on."
                )


def _flat(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    return {k: v for name, part in value.items() for k, v in _flat(part, f"{path}.{name}").items()}


def restore_job(workdir: Path) -> tuple[Setup, Arrays]:
    """The setup and the trained parameters of a finished or interrupted run, from its checkpoint.

    Raises:
      FileNotFoundError: no run in `workdir`. ValueError: its checkpoint is damaged.
    """
    with Checkpoints(workdir, create=False) as checkpoints:
        setup = make_setup(from_json(checkpoints.about()["config"]))
        params, _ = checkpoints.model(setup.params, setup.rest)
    return setup, params


def evaluate_job(workdir: Path, **choice: Any) -> list[Row]:
    """Rows from the checkpoint alone, written to `workdir`/eval.json; choice: of `choose_plans`."""
    setup, params = restore_job(workdir)
    inputs = make_inputs(setup.config, setup.model)
    rows = make_rows(setup, params, inputs, choose_plans(setup, params, **choice))
    write_results(workdir / "eval.json", rows, setup.config)
    return rows


def write_results(path: Path, rows: list[Row], config: Config) -> None:
    """{'rows', 'config', 'device'} as JSON."""
    result = {"rows": rows, "config": to_json(config), "device": jax.devices()[0].device_kind}
    path.write_text(json.dumps(result, indent=1) + "\n")
