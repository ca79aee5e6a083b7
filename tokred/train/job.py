"""The main job: train, learn the rates, compare the methods at equal cost, write what came out."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from tokred import viz
from tokred.nn.skeleton import Weights
from tokred.train.checkpoint import METRIC, Checkpoints
from tokred.train.clock import Clock, Tracer, format_summary
from tokred.train.config import Config, to_json
from tokred.train.evaluate import Row, check_budget, choose_plans, draw, make_evaluator, make_rows
from tokred.train.inputs import Inputs, make_inputs
from tokred.train.log import LogError, RunLog
from tokred.train.loop import Around, Place, Save, run_stage
from tokred.train.mesh import check_batch
from tokred.train.processes import Preemption, flat_fields, is_main, require_same_config
from tokred.train.programs import keep_programs
from tokred.train.setup import Setup, learned_plan, make_setup, restore_setup
from tokred.train.start import starting_weights
from tokred.train.state import State, result

# What may not change midway; mesh, log, checkpoint and evaluate may.
TRAINS = (
    "seed",
    "start_from",
    "start_parts",
    "model",
    "data",
    "train",
    "optimizer",
    "loss",
    "distill",
    "rates",
)
FREE_FIELDS = ("data.eval_batch", "data.threads", "data.data_dir", "data.placements")


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a run goes on: number of the stage, weights, and within a stage its state and place
    in the data."""

    stage: int
    weights: Weights
    state: State | None = None
    place: Place | None = None


def run_job(
    config: Config, workdir: Path, *, allow_changes: bool = False, profile: bool = False
) -> list[Row]:
    """Trains in `workdir`, or goes on from the last checkpoint there, and evaluates.

    Writes checkpoints/, metrics.jsonl, profile.json, results.json, pareto.png and tokens.png;
    returns the rows of results.json: see `evaluate.make_rows`. Programs are kept, see
    `keep_programs`. allow_changes: go on although the config differs from that of the checkpoint.
    profile: write a trace of some steps to profile/. Every process of the job calls this with the
    same arguments.

    Raises:
      ValueError: a config that does not fit, or a workdir with a run of another config.
      Preempted: SIGTERM came; the state is saved.
    """
    require_same_config(to_json(config))
    require_writable(workdir)
    setup = make_setup(config)
    keep_programs(setup.mesh)
    check_batch(setup.mesh, config.data.batch, config.optimizer.accumulate)
    check_budget(setup)
    inputs = make_inputs(config, setup.model, setup.mesh)
    weights = train(setup, inputs, workdir, allow_changes=allow_changes, profile=profile)
    rows = make_rows(setup, weights, inputs, choose_plans(setup, weights.params))
    learned = learned_plan(setup, weights.params)
    methods = () if learned is None else (learned.name,)
    plans = choose_plans(setup, weights.params, methods=methods)
    draw(setup, weights, inputs, [*plans.values()][-1][0], workdir)
    if is_main():
        write_results(workdir / "results.json", rows, config)
        viz.plot_pareto(rows, workdir / "pareto.png")
    return rows


def train(
    setup: Setup,
    inputs: Inputs,
    workdir: Path,
    *,
    allow_changes: bool = False,
    profile: bool = False,
) -> Weights:
    """The weights after all stages; steps that `workdir` holds already are not repeated."""
    config, kept = setup.config, dict(setup.config.checkpoint)
    save_every, profiles = kept.pop("every"), {}
    with Checkpoints(workdir, **kept) as checkpoints, Preemption() as preemption:
        point = resume(setup, checkpoints, allow_changes=allow_changes)
        log = RunLog(
            workdir, kept=_kept(setup, point), tensorboard=config.log.tensorboard, write=is_main()
        )
        with naming_the_last_step(checkpoints), log:
            for number in range(point.stage, len(setup.stages)):
                stage, clock = setup.stages[number], Clock()
                tracer = Tracer(workdir / "profile" / stage.name if profile else None)
                around = Around(
                    log=log,
                    every=config.log.every,
                    save=make_saver(setup, checkpoints, number, inputs, log),
                    save_every=save_every,
                    stop=preemption.reached,
                    progress=config.log.progress and is_main(),
                    trace=tracer,
                    clock=clock,
                )
                point = run_from(setup, inputs, point, around)
                profiles[stage.name] = clock.summary()
                _tell_profile(stage.name, profiles, workdir)
        return point.weights


@contextlib.contextmanager
def naming_the_last_step(checkpoints: Checkpoints) -> Iterator[None]:
    """A log that cannot be written says which step is the last good one."""
    try:
        yield
    except LogError as error:
        raise checkpoints.not_written("the log", error) from error


def require_writable(workdir: Path) -> None:
    """Makes the directory. Raises OSError where files cannot be written there."""
    if workdir.parts[0].endswith(":"):  # pathlib makes gs:/bucket of gs://bucket
        raise ValueError(
            f"workdir {workdir} is an address, not a directory; mount the bucket (docs/launch.md) "
            "and give --workdir as a path."
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise OSError(
            f"workdir {workdir} cannot be written ({error.strerror}); give another --workdir."
        ) from error


def run_from(setup: Setup, inputs: Inputs, point: Point, around: Around) -> Point:
    """Runs the stage of `point` to its end; the next point."""
    number = point.stage
    batches = inputs.train_batches(setup.config.seed + number)
    if point.place is not None:
        batches.set_state(point.place)
    state = setup.start(number, point.weights) if point.state is None else point.state
    state = run_stage(
        setup.stages[number],
        setup.skeleton,
        state,
        batches,
        mesh=setup.mesh,
        rules=setup.rules,
        frozen=setup.frozen if setup.stages[number].objective.teacher else {},
        around=around,
    )
    return Point(number + 1, result(state))


def _kept(setup: Setup, point: Point) -> Any:
    """Which lines of the log stand before `point`."""
    order = {stage.name: i for i, stage in enumerate(setup.stages)}
    step = 0 if point.state is None else int(point.state["step"])
    return lambda stage, at: (order.get(stage, -1), at) <= (point.stage, step)


def _tell_profile(stage: str, profiles: Mapping[str, Any], workdir: Path) -> None:
    if is_main():
        print(format_summary(stage, profiles[stage]))
        (workdir / "profile.json").write_text(json.dumps(profiles, indent=1) + "\n")


def make_saver(
    setup: Setup, checkpoints: Checkpoints, number: int, inputs: Inputs, log: RunLog
) -> Save:
    """A function that stores the state and the place in the data of stage `number`.

    With config.checkpoint.best it evaluates first, under the stage's own plan.
    """
    before = sum(stage.steps for stage in setup.stages[:number])
    config, plain, stage = setup.config, to_json(setup.config), setup.stages[number]
    evaluate = make_evaluator(setup, inputs, stage.objective.plan)

    def save(state: State, place: Place) -> None:
        with jax.transfer_guard("allow"):
            weights, step = result(state), int(state["step"])
            plan = learned_plan(setup, weights.params, number)
            counts = None if plan is None else [list(c) for c in setup.counts(plan)]
            schedule = {"method": "dense" if plan is None else plan.name, "counts": counts}
            metrics = None
            if config.checkpoint.best:
                metrics = {METRIC: evaluate(weights)["accuracy"] or 0.0}
                log.write(stage.name, step, {f"eval_{k}": v for k, v in metrics.items()})
            checkpoints.save(
                before + step,
                state,
                data={"place": place, "samples": step * config.data.batch},
                about={"config": plain, "stage": number, "schedule": schedule},
                metrics=metrics,
            )

    return save


def resume(setup: Setup, checkpoints: Checkpoints, *, allow_changes: bool = False) -> Point:
    """Where to go on: at the last checkpoint, else from config.start_from, else from scratch.

    Raises:
      ValueError: the checkpoint is of another config, or damaged.
    """
    if checkpoints.latest is None:
        return Point(0, starting_weights(setup))
    about = checkpoints.about()
    if not allow_changes:
        require_same(to_json(setup.config), about["config"])
    number = about["stage"]
    if number >= len(setup.stages):
        raise ValueError(
            f"workdir holds a run in its stage {number + 1}, the config has {len(setup.stages)} "
            "stages; give back config.train.steps and config.rates.steps, or another --workdir."
        )
    state = checkpoints.state(setup.state_shapes(number))
    if int(state["step"]) >= setup.stages[number].steps:
        return Point(number + 1, result(state))
    return Point(number, result(state), state, find_place(setup.config, checkpoints.data()))


def find_place(config: Config, data: Mapping[str, Any]) -> Place:
    """Where in the stream to go on: after the samples that were seen, whatever the batch is now."""
    return {**data["place"], "next_index": data["samples"] // config.data.batch}


def require_same(config: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises ValueError naming the fields of the training that differ."""
    mine, theirs = (
        {
            name: value
            for section in TRAINS
            for name, value in flat_fields(fields.get(section), section).items()
            if name not in FREE_FIELDS
        }
        for fields in (config, stored)
    )
    differ = [k for k in {**mine, **theirs} if mine.get(k, ...) != theirs.get(k, ...)]
    if differ:
        told = ", ".join(
            f"config.{k}={theirs.get(k, 'absent')!r} (now {mine.get(k, 'absent')!r})"
            for k in differ[:5]
        )
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ValueError(
            f"workdir holds a run with {told}{more}; use the same config to go on, another "
            "--workdir, or --allow-changes to go on with the new values."
        )


def evaluate_job(workdir: Path, **choice: Any) -> list[Row]:
    """Rows from the checkpoint alone, written to `workdir`/eval.json; choice: of `choose_plans`."""
    setup, weights = restore_setup(workdir)
    keep_programs(setup.mesh)
    inputs = make_inputs(setup.config, setup.model, setup.mesh)
    rows = make_rows(setup, weights, inputs, choose_plans(setup, weights.params, **choice))
    if is_main():
        write_results(workdir / "eval.json", rows, setup.config)
    return rows


def write_results(path: Path, rows: list[Row], config: Config) -> None:
    """{'rows', 'config', 'device'} as JSON."""
    result = {"rows": rows, "config": to_json(config), "device": jax.devices()[0].device_kind}
    path.write_text(json.dumps(result, indent=1) + "\n")
