"""One tidy table of many runs: CSV, Parquet, a picture, and a report in Markdown."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tokred import viz
from tokred.cost.bench import device_name

Row = dict[str, Any]
FIRST = ("line", "budget", "seed", "method")


def tidy(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The same rows with the same columns: what says which run it is, then numbers. Shares are of
    the whole dense model, also in rows of smaller ones, whose times were not taken beside it.

    Raises:
      ValueError: no rows, or none of the line 'dense'.
    """
    dense = [row["macs"] for row in rows if row["line"] == "dense"]
    if not dense:
        raise ValueError("sweep: no run of the line 'dense' is finished; run it first.")
    kept = [name for row in rows for name, value in row.items() if not isinstance(value, list)]
    columns = [*FIRST, *(name for name in dict.fromkeys(kept) if name not in FIRST)]
    full = [{name: row.get(name) for name in columns} for row in rows]
    full = [row | {"macs_ratio": row["macs"] / dense[0]} for row in full]
    apart = lambda row: row["method"] == "dense" and row["line"] != "dense"  # noqa: E731
    return [row | {"ms_ratio": None} if apart(row) else row for row in full]


def write_report(
    rows: Sequence[Mapping[str, Any]], workdir: Path, command: str, score: str
) -> None:
    """results.csv, results.parquet, frontier.png (without soft twins) and report.md; prints the
    table.
    """
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    told = tidy(rows)
    table = pyarrow.Table.from_pylist(told)
    pyarrow.csv.write_csv(table, workdir / "results.csv")
    pyarrow.parquet.write_table(table, workdir / "results.parquet")
    saving = [row for row in told if not row["method"].endswith(" soft")]  # a mask costs all MACs
    viz.plot_frontier(saving, workdir / "frontier.png", score)
    text = viz.format_table([_labelled(row) for row in told], _columns(told, score))
    seeds = sorted({row["seed"] for row in told})
    about = (
        f"Seeds {', '.join(map(str, seeds))}: mean ± half the range. MACs are of one example, as a "
        "share of the dense model's; milliseconds are medians within one run, beside the dense "
        "model of that run."
    )
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    made = f"Made on {device_name()}, {machine}, jax {jax.__version__}."
    parts = (
        f"```bash\n{command}\n```",
        about,
        f"```\n{text}\n```",
        f"![{score} over MACs](frontier.png)",
        f"{made} All runs: results.csv, results.parquet.",
    )
    (workdir / "report.md").write_text("\n\n".join(parts) + "\n")
    print(text)


def _labelled(row: Row) -> Row:
    budget = row["budget"]
    return row | {"method": row["line"] if budget is None else f"{row['line']} {budget:g}"}


def _columns(rows: Sequence[Row], score: str) -> list[str]:
    """What rows have, the score first."""
    known = [name for name in viz.FIELDS if any(row.get(name) is not None for row in rows)]
    return [score, *(name for name in known if name != score)]
