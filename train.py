"""Trains what a recipe says and compares the methods at equal cost.

python train.py --config=configs/NAME.py[:smoke] --workdir=DIR [--config.optimizer.lr=1e-3 ...]
"""

from collections.abc import Sequence
from pathlib import Path

from tokred.train.cli import Arguments, run


def main(argv: Sequence[str]) -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:smoke")
    parser.add_argument("--workdir", type=Path, required=True, help="where everything is written")
    args, overrides = parser.read(argv)

    from tokred import viz
    from tokred.train.config import load_config
    from tokred.train.job import run_job

    rows = run_job(load_config(args.config, overrides), args.workdir)
    print(viz.format_table(rows))
    print(f"written to {args.workdir}: results.json, pareto.png, tokens.png, checkpoints/")


if __name__ == "__main__":
    run(main)
