"""Evaluates a run from its checkpoint alone, at the same or at another budget; or real weights.

python eval.py --workdir=DIR [--macs=0.5 | --keep=0.7] [--method=tome,evit]
python eval.py --pretrained=NAME --methods=a,b [--budgets=0.75,0.5,0.25] [--workdir=DIR] [--json]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tokred.train.cli import Arguments, run

OF_RUNS = ("macs", "keep", "method")
OF_WEIGHTS = ("methods", "budgets", "count", "lengths", "rounds", "json")


def main(argv: Sequence[str]) -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="of a run of train.py; or for what is written")
    parser.add_argument("--macs", type=float, help="budget: MACs as a share of the dense model")
    parser.add_argument("--keep", type=float, help="budget: the methods' own keep ratio")
    parser.add_argument("--method", help="names, separated by commas; default: the config's")
    weights = parser.add_argument_group("real weights")
    weights.add_argument("--pretrained", metavar="NAME", help="see `python -m tokred pretrained`")
    weights.add_argument("--methods", help="names, separated by commas, or 'all'")
    weights.add_argument("--budgets", type=_floats, help="shares, default 0.75,0.5,0.25")
    weights.add_argument("--count", type=int, help="photographs, texts or sentences")
    weights.add_argument("--lengths", type=_integers, help="of prompts, default 512")
    weights.add_argument("--rounds", type=int, help="of timing, default 3")
    weights.add_argument("--json", action="store_true", default=None, help="instead of a table")
    args, _ = parser.read(argv)
    for name in OF_WEIGHTS if args.pretrained is None else OF_RUNS:
        if getattr(args, name) is not None:
            what = "goes with" if args.pretrained is None else "is not for"
            raise ValueError(f"--{name} {what} --pretrained; change one of the two.")
    (_evaluate_run if args.pretrained is None else _evaluate_weights)(args)


def _floats(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _evaluate_run(args: argparse.Namespace) -> None:
    if args.workdir is None:
        raise ValueError("--workdir=DIR of a run of train.py is missing; see --help.")
    from tokred import viz
    from tokred.train.job import evaluate_job

    methods = args.method.split(",") if args.method else None
    rows = evaluate_job(args.workdir, methods=methods, keep=args.keep, ratio=args.macs)
    print(viz.format_table(rows))
    print(f"written to {args.workdir / 'eval.json'}")


def _evaluate_weights(args: argparse.Namespace) -> None:
    from tokred.fidelity import TASKS, compare_pretrained, format_fidelity

    named = {name: getattr(args, name) for name in ("budgets", "count", "lengths", "rounds")}
    given = {name: value for name, value in named.items() if value is not None}
    methods = [name.strip() for name in (args.methods or "all").split(",")]
    rows, about = compare_pretrained(args.pretrained, methods, workdir=args.workdir, **given)
    if args.json:
        print(json.dumps({**about, "rows": rows}))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(format_fidelity(rows, TASKS[args.pretrained].columns))
    if args.workdir is not None:
        print(f"written to {args.workdir}")


if __name__ == "__main__":
    run(main)
