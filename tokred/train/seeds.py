"""A job under several seeds: python -m tokred.train.seeds --config=... --workdir=DIR --seeds=0,1,2

Prints mean and spread per method and writes DIR/results.json and DIR/pareto.png over all seeds;
each seed's run is in DIR/seed_N.
"""

from collections.abc import Sequence
from pathlib import Path

from tokred import viz
from tokred.train.cli import Arguments, run
from tokred.train.config import load_config
from tokred.train.job import run_job, write_results


def main(argv: Sequence[str]) -> None:
    """Runs every seed in turn; a seed that is finished is only evaluated again."""
    parser = Arguments(description=__doc__)
    parser.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:smoke")
    parser.add_argument("--workdir", type=Path, required=True, help="where everything is written")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, separated by commas")
    args, overrides = parser.read(argv)
    config, rows = load_config(args.config, overrides), []
    for seed in read_seeds(args.seeds):
        config.seed = seed
        rows += run_job(config, args.workdir / f"seed_{seed}")
    write_results(args.workdir / "results.json", rows, config)
    viz.plot_pareto(rows, args.workdir / "pareto.png")
    print(viz.format_table(rows))


def read_seeds(text: str) -> list[int]:
    """[0, 1] of '0,1'. Raises ValueError for anything else."""
    seeds = text.split(",")
    if not all(seed.strip().isdigit() for seed in seeds):
        raise ValueError(f"--seeds must be numbers such as 0,1,2, got {text!r}.")
    return [int(seed) for seed in seeds]


if __name__ == "__main__":
    run(main)
