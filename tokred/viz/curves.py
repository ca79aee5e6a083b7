"""Loss against compute: one line per method, a band over its seeds."""

from collections.abc import Sequence
from os import PathLike

import numpy as np

from tokred.viz.style import LABEL, PALETTE, SMALL, TITLE, new_figure, save
from tokred.viz.table import Row, group_by_method

LINES = ("-", "--", "-.", ":")


def plot_curves(rows: Sequence[Row], path: str | PathLike) -> None:
    """Training loss over the MACs spent, mean and range over seeds, written to `path`.

    rows: with 'method' and 'curve', pairs (MACs, loss) in order of training.

    Raises:
      ValueError: no rows, or seeds of one method with different lengths of curves.
    """
    figure = new_figure(7, 4.6)
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
    panel.set_xlabel("training MACs", fontsize=LABEL)
    panel.set_ylabel("training loss, nats per token", fontsize=LABEL)
    panel.set_title("Loss at equal compute, lower is better", fontsize=TITLE)
    panel.tick_params(labelsize=SMALL)
    panel.legend(fontsize=SMALL, frameon=False)
    save(figure, path)


def plot_lengths(rows: Sequence[Row], path: str | PathLike) -> None:
    """Share of right answers over the number of visual tokens, written to `path`.

    rows: with 'line' (the name of the curve), 'tokens', 'seed' and 'exact' in [0, 1].

    Raises:
      ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows are empty: train a model first.")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["line"], []).append(row)
    figure = new_figure(7, 4.6)
    panel = figure.subplots()
    for number, (name, group) in enumerate(lines.items()):
        tokens = sorted({row["tokens"] for row in group})
        exact = [[100 * r["exact"] for r in group if r["tokens"] == n] for n in tokens]
        colour, style = PALETTE[number % len(PALETTE)], LINES[number % len(LINES)]
        mean = [float(np.mean(shares)) for shares in exact]
        panel.plot(tokens, mean, color=colour, linestyle=style, marker="o", label=name)
        low, high = [min(s) for s in exact], [max(s) for s in exact]
        panel.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("visual tokens", fontsize=LABEL)
    panel.set_ylabel("right answers %", fontsize=LABEL)
    panel.set_title("Right answers by visual tokens, higher is better", fontsize=TITLE)
    panel.tick_params(labelsize=SMALL)
    panel.legend(fontsize=SMALL, frameon=False)
    save(figure, path)
