"""Results as plain text, and the grouping of results rows by method."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# Per field: heading, factor, decimals.
FIELDS = {
    "accuracy": ("accuracy %", 100, 1),
    "recall": ("recall %", 100, 1),
    "loss": ("loss", 1, 4),
    "bits_per_byte": ("bits/byte", 1, 4),
    "causal_bits_per_byte": ("causal bits/byte", 1, 4),
    "agreement": ("gate agrees %", 100, 1),
    "exact": ("whole targets %", 100, 1),
    "deletion_rate": ("deleted %", 100, 1),
    "overflow": ("overflow", 1, 2),
    "padding": ("padding %", 100, 1),
    "tokens": ("tokens", 1, 0),
    "correlation": ("correlation", 1, 4),
    "iou": ("IoU", 1, 3),
    "spearman": ("rank correlation", 1, 4),
    "cosine": ("cosine", 1, 4),
    "perplexity": ("perplexity", 1, 2),
    "perplexity_ratio": ("ratio", 1, 3),
    "agrees": ("agrees %", 100, 1),
    "needle": ("needle %", 100, 1),
    "cache_bytes": ("cache MB", 1e-6, 2),
    "cache_ratio": ("cache ratio", 1, 3),
    "params": ("params M", 1e-6, 2),
    "steps": ("steps", 1, 0),
    "train_macs": ("training TMACs", 1e-12, 2),
    "macs": ("MMACs", 1e-6, 2),
    "encoder_ratio": ("encoder MACs", 1, 3),
    "macs_ratio": ("MACs ratio", 1, 3),
    "ms": ("ms", 1, 2),
    "ms_low": ("ms low", 1, 2),
    "ms_high": ("ms high", 1, 2),
    "ms_ratio": ("ms ratio", 1, 3),
    "step_ms": ("ms/step", 1, 1),
    "conversion": ("conversion", 1, 2),
    "ms_pipelined": ("ms pipelined", 1, 2),
    "peer_ms": ("peer ms", 1, 2),
    "peer_ratio": ("peer / ours", 1, 2),
    "peer_bytes": ("peer MB", 1e-6, 2),
    "compile_s": ("compile s", 1, 2),
    "compile_ratio": ("compile ratio", 1, 2),
    "temp_bytes": ("temp MB", 1e-6, 0),
    "share": ("share", 1, 3),
    "block_share": ("of a block", 1, 3),
    "used_bytes": ("used MB", 1e-6, 2),
    "bytes": ("moved MB", 1e-6, 1),
    "activations": ("activations M", 1e-6, 2),
    "compiled_macs": ("compiled MMACs", 1e-6, 1),
    "attention_macs": ("attention MMACs", 1e-6, 1),
    "mlp_macs": ("MLP MMACs", 1e-6, 1),
    "reduction_macs": ("reductions MMACs", 1e-6, 2),
    "outer_macs": ("around MMACs", 1e-6, 1),
    "decode_ms_1": ("ms/token b1", 1, 2),
    "decode_ms_16": ("ms/token b16", 1, 2),
}
NOTHING, GROUP = "–", "exact_"


def format_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """One line per method, in order of first appearance, numbers aligned to the right.

    rows: one mapping per method and seed with 'method' and the fields of `columns`: 'accuracy',
    'recall' and 'agreement' as fractions, 'macs', 'macs_ratio', 'ms', 'ms_ratio' and others of
    `FIELDS`; 'exact_NAME' is the share of right answers in a group. columns: which fields, in which
    order; default all of `FIELDS` that the rows have. Seeds become mean ± half the range, where
    they differ; None becomes '–'.

    Raises:
      ValueError: no rows, an unknown column, a missing field, or None for some seeds only.
    """
    if columns is None:
        columns = [name for name in FIELDS if any(name in row for row in rows)]
    for name in columns:
        if name not in FIELDS and not name.startswith(GROUP):
            raise ValueError(
                f"columns must be among {tuple(FIELDS)}, got {name!r}: change columns."
            )
    groups = group_by_method(rows)
    head = ["method", *(_format(name)[0] for name in columns)]
    body = [
        [method, *(_cell(values(group, name), name) for name in columns)]
        for method, group in groups.items()
    ]
    return _align([head, *body])


def group_by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of every method, methods in order of first appearance.

    Raises ValueError where there are no rows or a row names no method.
    """
    if not rows:
        raise ValueError("rows must hold at least one result, got none: change rows.")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_field(row, "method"), []).append(row)
    return groups


def values(rows: Sequence[Row], name: str) -> list[float]:
    """The field of every row of one method; empty where it is None in all of them.

    Raises ValueError where the field is missing, or None in some rows only.
    """
    found = [_field(row, name) for row in rows]
    present = [float(x) for x in found if x is not None]
    if present and len(present) < len(found):
        raise ValueError(
            f"rows[{name!r}] of method {rows[0]['method']!r} must be a number in all rows or None "
            f"in all, got {found}: change {name}."
        )
    return present


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _field(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"rows must have the field {name!r}, got one with {sorted(row)}: add it.")
    return row[name]


def _format(name: str) -> tuple[str, float, int]:
    return FIELDS[name] if name in FIELDS else (f"{name.removeprefix(GROUP)} %", 100, 1)


def _cell(numbers: Sequence[float], name: str) -> str:
    if not numbers:
        return NOTHING
    _, factor, digits = _format(name)
    text = f"{factor * mean(numbers):.{digits}f}"
    spread = factor * (max(numbers) - min(numbers)) / 2
    return f"{text} ± {spread:.{digits}f}" if spread else text


def _align(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(_line(cells, widths) for cells in [lines[0], rule, *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join([first.strip().ljust(widths[0]), *rest])
