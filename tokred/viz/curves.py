"""Scores against compute and tokens: one line per method, a band over its seeds."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from scipy import stats

from tokred.viz.style import LABEL, MARKERS, PALETTE, SMALL, TITLE, new_figure, save
from tokred.viz.table import FIELDS, Row, group_by_method

LINES = ("-", "--", "-.", ":")


def plot_curves(rows: Sequence[Row], path: str | PathLike) -> None:
    """Training loss over the MACs spent, mean and range over seeds, written to `path`.

    rows: with 'method' and 'curve', pairs (MACs, loss) in order of training.

    Raises:
      ValueError: no rows, or seeds of one method with different lengths of curves.
    """
    figure = new_figure(8.5, 4.6)
    panel = figure.subplots()
    for number, (method, group) in enumerate(group_by_method(rows).items()):
        lengths = {len(row["curve"]) for row in group}
        if len(lengths) > 1:
            raise ValueError(
                f"curves of method {method!r} must be equally long for all seeds, got lengths "
                f"{sorted(lengths)}: finish all runs."
            )
        curves = np.asarray([row["curve"] for row in group])  # [seeds, points, 2]
        spent, loss = curves[0, :, 0], curves[..., 1]
        colour = PALETTE[number % len(PALETTE)]
        style = LINES[number % len(LINES)]
        panel.plot(spent, loss.mean(0), color=colour, linestyle=style, label=method)
        panel.fill_between(spent, loss.min(0), loss.max(0), color=colour, alpha=0.15, linewidth=0)
    _finish(panel, "training MACs", "training loss, nats per token", "Loss at equal compute")
    save(figure, path)


def plot_lengths(rows: Sequence[Row], path: str | PathLike) -> None:
    """Share of right answers over the number of visual tokens, written to `path`.

    rows: with 'line' (the name of the curve), 'tokens', 'seed' and 'exact' in [0, 1].

    Raises:
      ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows are empty: train a model first.")
    figure = new_figure(8.5, 4.6)
    panel = figure.subplots()
    for number, (name, group) in enumerate(_by(rows, "line").items()):
        points = sorted(_by(group, "tokens").items())
        exact = [[100 * row["exact"] for row in rows] for _, rows in points]
        mean, low, high = zip(*((np.mean(s), min(s), max(s)) for s in exact), strict=True)
        _draw_line(panel, number, name, [n for n, _ in points], mean, low, high)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    _finish(panel, "visual tokens", "right answers %", "Right answers by visual tokens")
    save(figure, path)


def plot_frontier(rows: Sequence[Row], path: str | PathLike, score: str = "accuracy") -> None:
    """A score over MACs, written to `path`: a line per method through the means of its budgets,
    with a band in which the mean lies with 95 % confidence (Student's t over the seeds, within 0
    and 100 for percentages; none for one seed).

    rows: with 'line' (the name of the curve), 'budget', 'macs_ratio' and the score. A method with a
    single budget is a point with a bar.

    Raises:
      ValueError: no rows, or rows without the score.
    """
    if not rows:
        raise ValueError("rows are empty: train a model first.")
    if any(row.get(score) is None for row in rows):
        raise ValueError(f"rows[{score!r}] must be a number in every row: change score.")
    heading, factor, _ = FIELDS.get(score, (score, 1, 0))
    bounds = (0, 100) if factor == 100 else (-np.inf, np.inf)
    figure = new_figure(8.5, 4.6)
    panel = figure.subplots()
    for number, (name, group) in enumerate(_by(rows, "line").items()):
        budgets = _by(group, "budget").values()
        points = [
            (np.mean([row["macs_ratio"] for row in b]), *_interval(b, score)) for b in budgets
        ]
        spent, mean, half = np.array(sorted(points)).T * [[1], [factor], [factor]]
        low, high = np.clip([mean - half, mean + half], *bounds)
        _draw_line(panel, number, name, spent, mean, low, high)
    _finish(panel, "MACs, 1 = dense", heading, f"{heading} over MACs, bands: 95 % confidence")
    save(figure, path)


def _interval(rows: Sequence[Row], score: str) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval; 0 for one seed."""
    found = [row[score] for row in rows]
    if len(found) == 1:
        return found[0], 0.0
    spread = np.std(found, ddof=1) / np.sqrt(len(found))
    return float(np.mean(found)), float(stats.t.ppf(0.975, len(found) - 1) * spread)


def _by(rows: Sequence[Row], name: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def _draw_line(panel: Any, number: int, name: str, x: Any, mean: Any, low: Any, high: Any) -> None:
    """A curve with a band, or where there is one point only, a point with a bar."""
    colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
    if len(x) == 1:
        reach = np.abs(np.array([low, high]) - np.array(mean))
        panel.errorbar(x, mean, reach, color=colour, marker=marker, linestyle="none", label=name)
        return
    panel.plot(
        x, mean, color=colour, linestyle=LINES[number % len(LINES)], marker=marker, label=name
    )
    panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _finish(panel: Any, x: str, y: str, title: str) -> None:
    panel.set_xlabel(x, fontsize=LABEL)
    panel.set_ylabel(y, fontsize=LABEL)
    panel.set_title(title, fontsize=TITLE)
    panel.tick_params(labelsize=SMALL)
    panel.figure.legend(loc="outside right upper", fontsize=SMALL, frameon=False)
