"""A job under several seeds: python -m tokred.train.seeds --config=... --workdir=DIR --seeds=0,1,2

Prints mean and spread per method and writes DIR/results.json and DIR/pareto.png over all seeds;
each seed's run is in DIR/seed_N. Several recipes, separated by commas, are compared: their rows
bear the recipe's name, their runs are in DIR/RECIPE/seed_N. In config.start_from '{seed}' stands
for the seed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokred import viz
from tokred.train.cli import Arguments, run
from tokred.train.config import load_config
from tokred.train.job import run_job, write_results


def main(argv: Sequence[str]) -> None:
    """Runs every seed in turn; a seed that is finished is only evaluated again."""
    parser = Arguments(description=__doc__)
    recipes = "configs/NAME.py or configs/NAME.py:smoke, or several"
    parser.add_argument("--config", required=True, help=recipes)
    parser.add_argument("--workdir", type=Path, required=True, help="where everything is written")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, separated by commas")
    args, overrides = parser.read(argv)
    recipes, rows = args.config.split(","), []
    configs = [load_config(recipe, overrides) for recipe in recipes]
    starts = [config.start_from for config in configs]
    names = [Path(recipe.partition(":")[0]).stem for recipe in recipes]
    for seed in read_seeds(args.seeds):
        for name, config, start in zip(names, configs, starts, strict=True):
            config.seed = seed
            config.start_from = fill_start(start, seed=seed)
            alone = len(recipes) == 1
            workdir = args.workdir if alone else args.workdir / name
            found = run_job(config, workdir / f"seed_{seed}")
            label = "" if alone else f"{name}: "
            rows += [row | {"method": label + row["method"]} for row in found]
    write_results(args.workdir / "results.json", rows, configs[0])
    viz.plot_pareto(rows, args.workdir / "pareto.png")
    print(viz.format_table(rows))


def fill_start(start: str | None, **known: Any) -> str | None:
    """A config's start_from with what is known for '{seed}' and other names in braces."""
    for name, value in known.items():
        start = start and start.replace(f"{{{name}}}", str(value))
    return start


def read_seeds(text: str, flag: str = "--seeds") -> list[int]:
    """[0, 1] of '0,1'. Raises ValueError, which names the flag, for anything else."""
    seeds = text.split(",")
    if not all(seed.strip().isdigit() for seed in seeds):
        raise ValueError(f"{flag} must be numbers such as 0,1,2, got {text!r}.")
    return [int(seed) for seed in seeds]


if __name__ == "__main__":
    run(main)
