"""One model for every number of visual tokens, against a model for each:

python -m tokred.train.matryoshka --workdir=DIR --seeds=0,1,2

Trains a model with all tokens on questions about grids of digits (--start), and goes on from it,
first the connector, then the decoder too (--config): Matryoshka queries whose length is drawn for
every step, queries of one fixed length for each of --lengths, the first again for as many steps as
these take together, and average pooling, uniform and random tokens whose number is drawn likewise;
answers with every length. Beside them a connector of one token that is told the question (QueCC),
and the same without it. Writes DIR/results.json and DIR/lengths.png and prints shares of right
answers, means and half ranges over the seeds.

A run that is finished is not repeated, one that was stopped goes on. The same command in several
processes, one for each device or core, shares the runs among them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokred import viz
from tokred.train.cli import Arguments, run
from tokred.train.config import Config, load_config, to_json
from tokred.train.evaluate import macs_ratio, make_evaluator
from tokred.train.finished import keep_rows, read_rows, shared
from tokred.train.inputs import make_inputs
from tokred.train.job import train
from tokred.train.seeds import read_seeds
from tokred.train.setup import make_setup

Row = dict[str, Any]
DENSE, ONLY, LONGER = "dense", "mqt only", "mqt, the steps of all together"
RECIPE, START = "configs/grid_mqt_two_stage.py", "configs/grid_dense.py"
LENGTHS = "1,2,4,8,16,32,64"
BASELINES = ("pooling", "uniform", "random")
CONDITIONED = {"quecc": True, "quecc without the question": False}
ANSWERS = "answers.json"


def main(argv: Sequence[str]) -> None:
    """Trains every model under every seed and asks it with every length."""
    parser = Arguments(description=__doc__)
    parser.add_argument("--config", default=RECIPE, help="the recipe of the Matryoshka model")
    parser.add_argument("--start", default=START, help="the recipe of the model to go on from")
    parser.add_argument("--workdir", type=Path, required=True, help="where everything is written")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, separated by commas")
    parser.add_argument("--lengths", default=LENGTHS, help="tokens, separated by commas")
    parser.add_argument(
        "--baselines", default=",".join(BASELINES), help="of " + ",".join(BASELINES)
    )
    args, overrides = parser.read(argv)
    lengths = read_seeds(args.lengths, "--lengths")
    names = [name for name in args.baselines.split(",") if name]
    jobs: list[Job] = []
    for seed in read_seeds(args.seeds):
        start = args.workdir / DENSE / f"seed_{seed}"
        dense = (DENSE, load_config(args.start, overrides), [{}])
        others = models(args.config, overrides, lengths, names)
        for name, config, asked in (dense, *others):
            config.seed, config.start_from = seed, None if name == DENSE else str(start)
            jobs.append(Job(name, config, args.workdir / name / f"seed_{seed}", asked))
    rows = answer_all(jobs, args.workdir)
    print(viz.format_table(rows, [name for name in COLUMNS if all(name in row for row in rows)]))


COLUMNS = ("tokens", "exact", "macs_ratio", *(f"exact_{kind}" for kind in ("which", "row", "read")))


def models(
    recipe: str, overrides: Sequence[str], lengths: Sequence[int], baselines: Sequence[str]
) -> Iterator[tuple[str, Config, list[dict[str, Any]]]]:
    """(name, config, options of the plans to answer with) of every model."""

    def config_of(**changes: Any) -> Config:
        config = load_config(recipe, overrides)
        with config.unlocked():
            for name, value in changes.items():
                config.train[name] = value
        return config

    config = config_of()
    each, whole = dict(config.train.options), make_setup(config).layout.tokens
    nested = [{**each, "length": m} for m in lengths]
    yield "mqt", config_of(each=tuple(lengths)), nested
    longer = config_of(each=tuple(lengths), steps=len(lengths) * config.train.steps)
    yield LONGER, longer, nested
    for options in nested:
        yield f"{ONLY} {options['length']}", config_of(each=(options["length"],)), [options]
    for name in baselines:
        shares = [{"keep": m / whole, "site": "output"} for m in lengths]
        keeps = tuple(share["keep"] for share in shares)
        how = {"method": name, "options": {"site": "output"}, "vary": "keep", "each": keeps}
        yield name, config_of(**how), shares
    for name, conditioned in CONDITIONED.items():
        options = {"keep": 1 / whole, "conditioned": conditioned}
        yield name, config_of(method="quecc", options=options, vary="", each=()), [options]


class Job(NamedTuple):
    """A model to train and to answer with."""

    name: str
    config: Config
    workdir: Path
    asked: Sequence[dict[str, Any]]

    @property
    def ready(self) -> bool:
        """Whether what it goes on from is finished."""
        start = self.config.start_from
        return start is None or (Path(start) / ANSWERS).exists()


def answer_all(jobs: Sequence[Job], workdir: Path) -> list[Row]:
    """The rows of all, in their order, written after each."""
    found: dict[int, list[Row]] = {}
    rows: list[Row] = []
    for i, more in shared(jobs, answer):
        found[i] = more
        rows = [row for i in sorted(found) for row in found[i]]
        write(rows, workdir)
    return rows


def answer(job: Job) -> list[Row]:
    """Trains, or goes on, and evaluates with each of the options; kept in answers.json, which is
    read again as long as nothing has changed."""
    name, config, workdir, asked = job
    path, of = workdir / ANSWERS, {"config": to_json(config), "asked": list(asked)}
    kept = read_rows(path, of)
    if kept is not None:
        return kept
    path.unlink(missing_ok=True)  # nothing goes on from what is trained again
    setup = make_setup(config)
    inputs = make_inputs(config, setup.model, setup.mesh)
    weights = train(setup, inputs, workdir)
    rows = []
    for options in asked:
        plan = setup.plan(config.train.method, **options)
        tokens = setup.model.image_tokens(plan)
        row = {"method": f"{name}: {tokens}", "model": name, "tokens": tokens, "seed": config.seed}
        row["line"] = "a model for each" if name.startswith(ONLY) else name
        row |= make_evaluator(setup, inputs, plan)(weights)
        rows.append({**row, "macs_ratio": macs_ratio(setup, plan)})
    keep_rows(path, of, rows)
    return rows


def write(rows: Sequence[Mapping[str, Any]], workdir: Path) -> None:
    """What there is so far."""
    (workdir / "results.json").write_text(json.dumps({"rows": list(rows)}, indent=1) + "\n")
    viz.plot_lengths(rows, workdir / "lengths.png")


if __name__ == "__main__":
    run(main)
