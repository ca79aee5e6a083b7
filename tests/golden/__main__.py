"""python -m tests.golden DIR [--only GLOB,GLOB] [--record]; exit status 1 if a case fails."""

import argparse
from pathlib import Path

from tests.golden import find_cases, record, run_case, selected, set_precision, summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("folder", type=Path, help="families as subfolders, or one of them")
    parser.add_argument("--only", default="", metavar="GLOB,GLOB", help="file names to run")
    parser.add_argument("--record", action="store_true", help="store the counts of passed cases")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder; name one that holds .npz cases")
    set_precision()
    outcomes = []
    for file in selected(find_cases(args.folder), [g for g in args.only.split(",") if g]):
        outcomes.append(run_case(file))
        print(outcomes[-1], flush=True)
    print(summary(outcomes))
    if args.record:
        record(outcomes)
    return int(any(o.status == "failed" for o in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
