"""Trains what a recipe says and compares the methods at equal cost.

python train.py --config=configs/NAME.py[:smoke] --workdir=DIR [--config.optimizer.lr=1e-3 ...]

The same command goes on where a run was stopped. With several processes every one gets the same
command; launchers are found from the environment, see docs/launch.md.
"""

from collections.abc import Sequence
from pathlib import Path

from tokred.train.cli import Arguments, run


def main(argv: Sequence[str]) -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:smoke")
    parser.add_argument("--workdir", type=Path, required=True, help="where everything is written")
    parser.add_argument(
        "--allow-changes", action="store_true", help="go on although the config has changed"
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a trace of some steps for TensorBoard"
    )
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--processes", type=int, help="how many processes the job has")
    parser.add_argument("--process", type=int, help="the number of this one")
    args, overrides = parser.read(argv)

    from tokred import viz
    from tokred.train.config import load_config
    from tokred.train.job import run_job
    from tokred.train.processes import is_main, joined

    config = load_config(args.config, overrides)
    how = {"allow_changes": args.allow_changes, "profile": args.profile}
    with joined(args.coordinator, args.processes, args.process):
        rows = run_job(config, args.workdir, **how)
        if is_main():
            print(viz.format_table(rows))
            made = ", ".join(sorted(path.name for path in args.workdir.iterdir()))
            print(f"written to {args.workdir}: {made}")


if __name__ == "__main__":
    run(main)
