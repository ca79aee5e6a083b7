"""The command line: `python -m tokred bench` times methods, `... methods` lists them."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from tokred.cost.bench import bench, device_name
from tokred.methods import Method, golden_passed, list_methods
from tokred.models import vit_config

DTYPES = ("float32", "bfloat16")
# Heading, field, format; times in milliseconds per batch.
BENCH_COLUMNS = (
    ("method", "method", "{}"),
    ("MMACs", "macs", "{:.1f}"),
    ("MACs ratio", "macs_ratio", "{:.3f}"),
    ("ms", "ms", "{:.1f}"),
    ("low", "ms_low", "{:.1f}"),
    ("high", "ms_high", "{:.1f}"),
    ("ms ratio", "ms_ratio", "{:.3f}"),
    ("compile s", "compile_s", "{:.2f}"),
    ("compile ratio", "compile_ratio", "{:.2f}"),
)
METHOD_FIELDS = (
    "method", "family", "site", "training", "needs", "count", "twins", "golden", "paper", "summary"
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code, 2 with one sentence on stderr for a user's error."""
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        print(f"python -m tokred {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="python -m tokred", description="Token reduction for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("bench", help="time methods against the dense model")
    run.set_defaults(run=_bench)
    run.add_argument("--model", default="vit_s16", help="vit_{ti,s,b,l,h} and the patch size")
    run.add_argument("--image-size", type=_positive, default=224, metavar="PIXELS")
    run.add_argument("--methods", default="dense,tome,evit,topk", metavar="NAME,NAME,...")
    run.add_argument("--batch", type=_positive, default=8)
    run.add_argument("--rounds", type=_positive, default=10, help="each times all methods once")
    budget = run.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=float, help="every method's keep ratio, in (0, 1]")
    budget.add_argument("--macs", type=float, help="target: this share of the dense MACs")
    run.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the computation")
    run.add_argument("--json", action="store_true", help="print JSON and nothing else")
    show = commands.add_parser("methods", help="list every method")
    show.set_defaults(run=_methods)
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def _bench(args: argparse.Namespace) -> None:
    config = vit_config(args.model, image_size=args.image_size, dtype=jnp.dtype(args.dtype))
    names = [name.strip() for name in args.methods.split(",")]
    rows = bench(
        config, names, batch=args.batch, rounds=args.rounds, keep=args.keep, ratio=args.macs
    )
    given = ("model", "image_size", "batch", "rounds", "keep", "dtype")
    meta = {name: getattr(args, name) for name in given} | {"macs_target": args.macs}
    meta |= {"device": device_name(), "jax": jax.__version__, "path": "packed twin, logits only"}
    if args.json:
        print(json.dumps({"rows": rows, **meta}))
        return
    print(", ".join(f"{name} {value}" for name, value in meta.items() if value is not None))
    print(_table([head for head, _, _ in BENCH_COLUMNS], [_cells(row) for row in rows]))


def _cells(row: dict[str, Any]) -> list[str]:
    scaled = row | {"macs": row["macs"] / 1e6}
    return [form.format(scaled[field]) for _, field, form in BENCH_COLUMNS]


def _methods(args: argparse.Namespace) -> None:
    rows = [describe(method) for method in list_methods()]
    if args.json:
        print(json.dumps({"methods": rows}))
    elif args.markdown:
        print(methods_markdown())
    else:
        print(_table(METHOD_FIELDS, [[_text(row[f]) for f in METHOD_FIELDS] for row in rows]))


def describe(method: Method) -> dict[str, Any]:
    """One method as a row of the table; golden: how many official cases the recorded run passed."""
    return {
        "method": method.name,
        "family": method.family,
        "site": method.site,
        "training": "learned" if method.learned else "training-free",
        "needs": list(method.needs),
        "count": method.count,
        "twins": method.twins,
        "golden": golden_passed(method),
        "paper": method.paper,
        "summary": method.summary,
    }


def methods_markdown() -> str:
    """The README's table of methods."""
    rows = [describe(method) for method in list_methods()]
    escape = lambda value: _text(value).replace("|", "\\|")  # noqa: E731
    lines = [METHOD_FIELDS, ["---"] * len(METHOD_FIELDS)]
    lines += [[escape(row[field]) for field in METHOD_FIELDS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(value)
    return str(value) or "–"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Aligned columns, those of numbers to the right."""
    columns = [_column(cells) for cells in zip(head, *body, strict=True)]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _column(cells: Sequence[str]) -> list[str]:
    width = max(map(len, cells))
    numbers = all(cell[:1].isdigit() for cell in cells[1:])
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in cells]


if __name__ == "__main__":
    sys.exit(main())
