"""`python -m tokred methods`: every method in a line."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from tokred.methods import Method, golden_passed, list_methods

FIELDS = (
    "method", "family", "site", "training", "needs", "count", "twins", "golden", "paper", "summary"
)  # fmt: skip


def add_methods(commands: Any) -> None:
    """The command's arguments."""
    show = commands.add_parser("methods", help="list every method")
    show.set_defaults(run=_methods)
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")


def _methods(args: argparse.Namespace) -> None:
    rows = [describe(method) for method in list_methods()]
    if args.json:
        print(json.dumps({"methods": rows}))
    elif args.markdown:
        print(methods_markdown())
    else:
        print(_table([FIELDS, *([_text(row[f]) for f in FIELDS] for row in rows)]))


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
    lines = [FIELDS, ["---"] * len(FIELDS)]
    lines += [[escape(row[field]) for field in FIELDS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(value)
    return str(value) or "–"


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = lambda line: (cell.ljust(n) for cell, n in zip(line, widths, strict=True))  # noqa: E731
    return "\n".join("  ".join(pad(line)).rstrip() for line in lines)
