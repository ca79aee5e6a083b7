"""What is kept over what it costs, readable without colours."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from tokred.viz.style import FAINT, INK, LABEL, MARKERS, PALETTE, SMALL, TITLE, new_figure, save
from tokred.viz.table import group_by_method

Row = dict[str, Any]
LINES = ("-", "--", "-.", ":")
NAMES = {
    "correlation": "correlation of heatmaps", "iou": "IoU of heatmaps", "cosine": "cosine",
    "spearman": "rank correlation of cosines", "perplexity_ratio": "perplexity / that of dense",
    "agrees": "agrees with the dense model's words", "needle": "planted numbers found",
    "macs_ratio": "MACs / MACs of dense", "cache_ratio": "cache bytes / those of dense",
}  # fmt: skip


def plot_fidelity(
    rows: Sequence[Row], panels: Sequence[str], cost: str, path: str | PathLike
) -> None:
    """One panel per field over `cost`, one line per method with its own marker and dashes; a dotted
    line is the dense model. Rows without a value are left out.

    Raises:
      ValueError: no rows. ImportError: without matplotlib.
    """
    groups = group_by_method(rows)
    figure = new_figure(4.2 * len(panels) + 1.6, 4.2)
    for panel, field in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(panel, groups, field, cost)
    figure.suptitle("What is kept by fewer tokens, and what they cost", fontsize=TITLE)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=SMALL, frameon=False)
    save(figure, path)


def _draw(panel: Any, groups: Any, field: str, cost: str) -> None:
    panel.set_xlabel(NAMES[cost], fontsize=LABEL)
    panel.set_ylabel(NAMES[field], fontsize=LABEL)
    panel.tick_params(labelsize=SMALL)
    panel.spines[["top", "right"]].set_visible(False)
    if field == "perplexity_ratio":
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
    for number, (method, group) in enumerate(groups.items()):
        points = sorted((r[cost], r[field]) for r in group if r[field] is not None)
        if method == "dense" and points:
            panel.axhline(points[0][1], color=FAINT, linestyle=":", label=method)
        elif points:
            x, y = zip(*points, strict=True)
            panel.plot(
                x, y, color=PALETTE[number % len(PALETTE)], marker=MARKERS[number % len(MARKERS)],
                linestyle=LINES[number % len(LINES)], markeredgecolor=INK, label=method,
                fillstyle="left" if number >= len(MARKERS) else "full",
            )  # fmt: skip
