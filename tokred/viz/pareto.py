"""Accuracy against cost: every method in one picture, with the dense model as the measure."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from tokred.viz.style import FAINT, INK, LABEL, MARKERS, PALETTE, SMALL, TITLE, new_figure, save
from tokred.viz.table import Row, group_by_method, mean, values

DENSE = "dense"
COSTS = {"macs_ratio": "MACs / MACs of dense", "ms_ratio": "time / time of dense"}
LEGEND_ROWS = 18


def plot_pareto(rows: Sequence[Row], path: str | PathLike) -> None:
    """Accuracy over the MACs ratio (left) and over the time ratio (right), written to `path`.

    rows: one mapping per method and seed with 'method', 'accuracy' (a fraction), 'macs_ratio',
    'ms_ratio' (1 = as dense). A method is a large marker at the mean, with bars from the smallest
    to the largest and a small point per seed where there are several; a dashed line is 'dense'; a
    grey staircase joins the methods that no other beats in both.

    Raises:
      ValueError: no rows, a missing field, or a value that is no number.
      ImportError: without matplotlib.
    """
    groups = {method: _points(group) for method, group in group_by_method(rows).items()}
    dense = groups.pop(DENSE, None)
    figure = new_figure(11, 4.6)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, cost in zip(panels, COSTS, strict=True):
        _draw_panel(panel, groups, dense, cost)
    panels[0].set_ylabel("accuracy %", fontsize=LABEL)
    figure.suptitle("Accuracy and cost of token reduction, up and left is better", fontsize=TITLE)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside right upper",
        fontsize=SMALL,
        frameon=False,
        ncols=-(-len(labels) // LEGEND_ROWS),
    )
    save(figure, path)


def _points(rows: Sequence[Row]) -> dict[str, list[float]]:
    found = {name: values(rows, name) for name in ("accuracy", *COSTS)}
    for name, numbers in found.items():
        if not numbers:
            raise ValueError(
                f"rows[{name!r}] of method {rows[0]['method']!r} must be a number, got None: "
                f"change {name}."
            )
    return found | {"accuracy": [100 * x for x in found["accuracy"]]}


def _draw_panel(panel: Any, groups: Mapping, dense: Mapping | None, cost: str) -> None:
    panel.set_xlabel(COSTS[cost], fontsize=LABEL)
    panel.grid(color="#E6E6E6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=SMALL)
    panel.margins(0.08)
    panel.axvline(1, color=FAINT, linewidth=0.8, linestyle=":")
    _draw_dense(panel, dense)
    _draw_frontier(panel, groups, cost)
    best_first = sorted(groups, key=lambda method: -mean(groups[method]["accuracy"]))
    order = {method: number for number, method in enumerate(groups)}
    for method in best_first:
        _draw_method(panel, method, order[method], groups[method], cost)


def _draw_dense(panel: Any, dense: Mapping | None) -> None:
    if dense is None:
        return
    accuracy = dense["accuracy"]
    panel.axhline(mean(accuracy), color=INK, linewidth=1.2, linestyle="--", label=DENSE)
    panel.axhspan(min(accuracy), max(accuracy), color=INK, alpha=0.07, linewidth=0)


def _draw_frontier(panel: Any, groups: Mapping, cost: str) -> None:
    means = sorted((mean(group[cost]), -mean(group["accuracy"])) for group in groups.values())
    steps, best = [], float("inf")
    for x, loss in means:
        if loss < best:
            steps, best = [*steps, (x, -loss)], loss
    if len(steps) > 1:
        x, y = zip(*steps, strict=True)
        panel.step(x, y, where="post", color=FAINT, linewidth=1, zorder=1.5, label="Pareto front")


def _draw_method(panel: Any, method: str, number: int, group: Mapping, cost: str) -> None:
    colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
    x, y = group[cost], group["accuracy"]
    if len(y) > 1:
        panel.scatter(x, y, s=12, color=colour, marker=marker, alpha=0.55, linewidths=0)
    panel.errorbar(
        mean(x),
        mean(y),
        xerr=_reach(x),
        yerr=_reach(y),
        color=colour,
        marker=marker,
        markersize=9,
        markeredgecolor=INK,
        markeredgewidth=0.7,
        elinewidth=1.2,
        linestyle="none",
        zorder=3,
        label=method,
    )


def _reach(numbers: Sequence[float]) -> list[list[float]]:
    """From the mean down to the smallest and up to the largest, never below 0 by rounding."""
    middle = mean(numbers)
    return [[max(0.0, middle - min(numbers))], [max(0.0, max(numbers) - middle)]]
