"""Rows as text."""

from collections.abc import Sequence
from typing import Any

from tokred.viz import format_table

Row = dict[str, Any]


def format_fidelity(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """One line per method and budget; then needles by length and depth, where there are any; then
    why budgets were out of reach."""
    named: list[Row] = [row | {"method": label(row)} for row in rows]
    parts = [format_table(named, columns)]
    places = list(rows[0].get("needles", ()))
    if places:
        each = lambda row: {f"exact_{p}": row["needles"].get(p) for p in places}  # noqa: E731
        found: list[Row] = [row | each(row) for row in named]
        parts.append(format_table(found, [f"exact_{place}" for place in places]))
    parts += [f"{label(row)}: {row['why']}" for row in rows if row["why"]]
    return "\n\n".join(parts)


def label(row: Row) -> str:
    """Method and budget."""
    return row["method"] if row["budget"] is None else f"{row['method']} {row['budget']:g}"
