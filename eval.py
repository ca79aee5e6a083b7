"""Evaluates a run from its checkpoint alone, at the same or at another budget.

python eval.py --workdir=DIR [--macs=0.5 | --keep=0.7] [--method=tome,evit]
"""

from collections.abc import Sequence
from pathlib import Path

from tokred.train.cli import Arguments, run


def main(argv: Sequence[str]) -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="of a run of train.py")
    parser.add_argument("--macs", type=float, help="budget: MACs as a share of the dense model")
    parser.add_argument("--keep", type=float, help="budget: the methods' own keep ratio")
    parser.add_argument("--method", help="names, separated by commas; default: the config's")
    args, _ = parser.read(argv)

    from tokred import viz
    from tokred.train.job import evaluate_job

    methods = args.method.split(",") if args.method else None
    rows = evaluate_job(args.workdir, methods=methods, keep=args.keep, ratio=args.macs)
    print(viz.format_table(rows))
    print(f"written to {args.workdir / 'eval.json'}")


if __name__ == "__main__":
    run(main)
