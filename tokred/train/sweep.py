"""Recipes x budgets x seeds, with what they are compared with:

python -m tokred sweep configs/sweep/digits.py --workdir=DIR

runs every job that is not finished, one after another, and writes DIR/results.csv and .parquet (a
line per run and method), DIR/frontier.png and DIR/report.md. --jobs prints a command per job, for
an array of them (in rounds: the dense ones first, since others may start from them), --job=NAME
runs one, --collect writes the table of what is there. A job that was stopped goes on from its last
checkpoint. The same command in several processes, one for each device or core, shares the jobs
among them.
"""

import functools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokred.train.cli import Arguments
from tokred.train.config import Config, import_file, load_config, to_json
from tokred.train.finished import LOCK, keep_rows, read_rows, shared
from tokred.train.job import evaluate_job, run_job
from tokred.train.seeds import fill_start, read_seeds
from tokred.train.setup import make_setup
from tokred.train.tidy import Row, write_report

DENSE, SMALLER, ROWS = "dense", "smaller dense", "rows.json"
BASELINES = ("random", "uniform", "pooling")


@dataclass(frozen=True)
class Trial:
    """One line of the frontier: a recipe, and budgets, which are values of a field of its config
    such as 'rates.target'; changes: other fields, as 'a.b=value'. In its start_from '{dense}'
    stands for the dense run of the same seed, '{seed}' for the seed."""

    recipe: str
    field: str = ""
    budgets: tuple[float, ...] = ()
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """What `python -m tokred sweep` runs; a file in configs/sweep/ gives it by `get_sweep()`.

    dense: the recipe without reduction. ratios: shares of its MACs at which `baselines` act on its
    weights, and at which dense models of fewer layers are trained. trials: by name. score: the
    field of the rows that the picture shows. depth: the fields of the config with the layers of
    what is reduced.
    """

    dense: str
    ratios: tuple[float, ...]
    trials: Mapping[str, Trial]
    seeds: tuple[int, ...] = (0, 1, 2)
    baselines: tuple[str, ...] = BASELINES
    score: str = "accuracy"
    depth: tuple[str, ...] = ("model.depth",)


@dataclass(frozen=True)
class Job:
    """One run. name: its directory within that of the sweep. line: what its rows are called, for
    reductions that were not trained their own name. more: shares of the dense MACs at which such
    reductions act, too. after: the directory of the run that it goes on from, None where it starts
    afresh or from elsewhere."""

    name: str
    line: str
    budget: float | None
    config: Config
    base: Path
    more: tuple[float, ...] = ()
    after: Path | None = None

    @property
    def workdir(self) -> Path:
        return self.base / self.name

    @property
    def ready(self) -> bool:
        """Whether what it goes on from is finished."""
        return self.after is None or (self.after / ROWS).exists()


def make_parser() -> Arguments:
    """The parser of the command."""
    parser = Arguments(prog="python -m tokred sweep", description=__doc__)
    parser.add_argument("config", help="configs/sweep/NAME.py or configs/sweep/NAME.py:smoke")
    parser.add_argument("--workdir", type=Path, required=True, help="where everything is written")
    parser.add_argument("--seeds", help="numbers, separated by commas, instead of the sweep's own")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--jobs", action="store_true", help="print a command per job, run nothing")
    only.add_argument("--job", metavar="NAME", help="run this one and write no table")
    only.add_argument("--collect", action="store_true", help="run nothing, write the table")
    return parser


def main(argv: Sequence[str]) -> None:
    """Runs what is left of a sweep, or one job of it."""
    args, overrides = make_parser().read(argv)
    sweep = load_sweep(args.config)
    seeds = sweep.seeds if args.seeds is None else tuple(read_seeds(args.seeds))
    jobs = {job.name: job for job in list_jobs(sweep, args.workdir, seeds, overrides)}
    command = ["python", "-m", "tokred", "sweep", *argv]
    if args.jobs:
        command.remove("--jobs")
        print(*(shlex.join([*command, f"--job={name}"]) for name in jobs), sep="\n")
    elif args.job is not None:
        run_named(args.job, jobs)
    else:
        rows: list[Row] = []
        found = dict(enumerate(finished(job) for job in jobs.values()))
        if not args.collect:
            found |= dict(shared(list(jobs.values()), run))
        for name, more in zip(jobs, found.values(), strict=True):
            if more is None:
                print(f"{name} is not finished and not in the table", file=sys.stderr)
            rows += more or []
        _tell_strangers(jobs, args.workdir)
        write_report(rows, args.workdir, shlex.join(command), sweep.score)


def load_sweep(recipe: str) -> Sweep:
    """The sweep of 'configs/sweep/NAME.py', or of 'configs/sweep/NAME.py:smoke' with all recipes
    at that size.

    Raises:
      FileNotFoundError: no such file. ValueError: it is no sweep, or names something twice.
    """
    path, _, arg = recipe.partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"sweep {path!r} is no python file; see configs/sweep/.")
    sweep = getattr(import_file(Path(path)), "get_sweep", lambda: None)()
    if not isinstance(sweep, Sweep):
        raise ValueError(f"sweep {path!r} has no get_sweep() of a Sweep; see configs/sweep/.")
    check_names(sweep)
    if not arg:
        return sweep
    small = {name: replace(t, recipe=f"{t.recipe}:{arg}") for name, t in sweep.trials.items()}
    return replace(sweep, dense=f"{sweep.dense}:{arg}", trials=small)


def check_names(sweep: Sweep) -> None:
    """Raises ValueError where two lines, budgets or seeds have one name."""
    lists = {"lines": [DENSE, SMALLER, *sweep.baselines, *sweep.trials], "seeds": sweep.seeds}
    lists |= {f"budgets of {name!r}": trial.budgets for name, trial in sweep.trials.items()}
    for what, names in {**lists, "ratios": sweep.ratios}.items():
        twice = sorted({name for name in names if list(names).count(name) > 1})
        if twice:
            raise ValueError(f"sweep: {what} have {twice[0]!r} twice; rename or remove one.")


def list_jobs(
    sweep: Sweep, workdir: Path, seeds: Sequence[int], overrides: Sequence[str] = ()
) -> Iterator[Job]:
    """Every run: for every seed the dense model, those of fewer layers, and all trials."""
    for seed in seeds:
        dense = load_config(sweep.dense, overrides)
        dense.seed, dense.evaluate.methods = seed, sweep.baselines
        dense.start_from = fill_start(dense.start_from, seed=seed)
        lowest, *more = sorted(sweep.ratios) or [dense.evaluate.macs]
        dense.evaluate.macs = lowest
        yield Job(f"{DENSE}/seed_{seed}", DENSE, None, dense, workdir, tuple(more))
        for layers in _smaller([_field(dense, path) for path in sweep.depth], sweep.ratios):
            fewer = [f"{path}={n}" for path, n in zip(sweep.depth, layers, strict=True)]
            config = load_config(sweep.dense, [*overrides, *fewer])
            config.start_from = fill_start(config.start_from, seed=seed)
            config.seed, config.evaluate.methods = seed, ()
            where = f"smaller_dense/depth_{'_'.join(map(str, layers))}/seed_{seed}"
            yield Job(where, SMALLER, sum(layers), config, workdir)
        for name, trial in sweep.trials.items():
            for budget in trial.budgets or (None,):
                own = [] if budget is None else [f"{trial.field}={budget}"]
                config = load_config(trial.recipe, [*overrides, *trial.changes, *own])
                config.seed, config.evaluate.methods = seed, ()
                base = workdir / DENSE / f"seed_{seed}"
                after = base if "{dense}" in (config.start_from or "") else None
                config.start_from = fill_start(config.start_from, seed=seed, dense=base)
                part = "" if budget is None else f"/{budget:g}"
                where = f"{name}{part}/seed_{seed}"
                yield Job(where, name, budget, config, workdir, after=after)


def _field(config: Config, path: str) -> Any:
    """The value of 'a.b'."""
    return functools.reduce(lambda section, name: section[name], path.split("."), config)


def _smaller(depths: Sequence[int], ratios: Sequence[float]) -> list[tuple[int, ...]]:
    """Layers that cost about such shares of a model, fewer than it has."""
    near = {tuple(max(1, round(depth * ratio)) for depth in depths) for ratio in ratios}
    return sorted(near - {tuple(depths)}, reverse=True)


def run_named(name: str, jobs: Mapping[str, Job]) -> None:
    """Runs one job, or waits for the process that does. Raises ValueError where there is none of
    this name, or it goes on from one that is not finished."""
    if name not in jobs:
        raise ValueError(f"sweep has no job {name!r}; --jobs lists all {len(jobs)}.")
    if not jobs[name].ready:
        raise ValueError(
            f"sweep: job {name!r} goes on from {jobs[name].after}, which is not finished; run its "
            "job first."
        )
    ((_, rows),) = shared([jobs[name]], run)
    for row in rows:
        print(json.dumps(row))


def finished(job: Job) -> list[Row] | None:
    """The rows of a finished job; None where it is not finished, or was another job."""
    return read_rows(job.workdir / ROWS, _identity(job))


def _identity(job: Job) -> Any:
    return {"config": to_json(job.config), "more": job.more}


def run(job: Job) -> list[Row]:
    """Trains, or goes on, and evaluates; the rows are kept in rows.json, which is written last."""
    kept = finished(job)
    if kept is not None:
        return kept
    here = job.workdir
    if any(path.name != LOCK for path in here.glob("*")):
        print(f"{job.name} was not finished; it goes on from its last checkpoint, if any")
    (here / ROWS).unlink(missing_ok=True)  # nothing goes on from what is trained again
    found = run_job(job.config, here)
    for ratio in job.more:
        others = evaluate_job(here, methods=job.config.evaluate.methods, ratio=ratio)
        found += [row | {"budget": ratio} for row in others if row["method"] != DENSE]
    learned = make_setup(job.config).stages[-1].objective.plan.name
    if learned != DENSE:  # then the dense row is none of this sweep's lines
        found = [row for row in found if row["method"] != DENSE]
    rows = [_named(job, row, learned) for row in found]
    keep_rows(here / ROWS, _identity(job), rows)
    return rows


def _named(job: Job, row: Row, learned: str) -> Row:
    method = row["method"]
    mine = method.startswith(learned)
    line = job.line + method.removeprefix(learned) if mine else method
    budget = job.budget if mine else row.get("budget", job.config.evaluate.macs)
    return {**row, "line": line, "budget": budget}


def _tell_strangers(jobs: Mapping[str, Job], workdir: Path) -> None:
    """Says which finished runs in the workdir are of no job any more."""
    found = {str(path.parent.relative_to(workdir)) for path in workdir.rglob(ROWS)}
    for name in sorted(found - set(jobs)):
        print(f"{name} is no job of this sweep and not in the table", file=sys.stderr)
