"""What lies in a cache while it is written to, and what is left of a sequence layer by layer."""

from collections.abc import Mapping
from os import PathLike

import numpy as np
from jaxtyping import Array, Int

from tokred.plan import Layout, Plan
from tokred.viz.style import INK, LABEL, MARKERS, PALETTE, SMALL, TITLE, new_figure, save


def plot_occupancy(
    entries: Int[Array | np.ndarray, "T L G"], path: str | PathLike, *, start: int = 0
) -> None:
    """Cache entries of one example by layer: over the steps (left, mean over key heads), and of
    every key head after the last (right), written to `path`.

    entries: such as `generate(..., watch=lambda c: c.entries(G)).watched[0]`. start: how many
    tokens had been read before the first step.

    Raises:
      ValueError: no steps. ImportError: without matplotlib.
    """
    entries = np.asarray(entries)
    if not entries.size:
        raise ValueError("entries are empty: watch at least one step.")
    steps, layers, heads = entries.shape
    figure = new_figure(10, 1.8 + 0.22 * layers)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    most = entries.max()
    extent = (start + 0.5, start + steps + 0.5, layers - 0.5, -0.5)
    shades = {"cmap": "cividis", "aspect": "auto", "vmin": 0, "vmax": max(most, 1)}
    left.imshow(entries.mean(-1).T, extent=extent, interpolation="nearest", **shades)
    left.set_xlabel("tokens read", fontsize=LABEL)
    left.set_ylabel("layer", fontsize=LABEL)
    shown = right.imshow(entries[-1], interpolation="nearest", **shades)
    right.set_xlabel("key head, after the last", fontsize=LABEL)
    right.set_xticks(range(heads))
    left.set_yticks(range(layers))
    figure.colorbar(shown, ax=[left, right], label="entries")
    figure.suptitle(f"Cache entries, {most} at most", fontsize=TITLE)
    save(figure, path)


def plot_schedules(plans: Mapping[str, Plan], layout: Layout, path: str | PathLike) -> None:
    """Tokens that are left after every layer under each plan, by name, written to `path`.

    Raises:
      ValueError: no plans, or one that does not fit the layout. ImportError: without matplotlib.
    """
    if not plans:
        raise ValueError("plans are empty: give a plan by its name.")
    figure = new_figure(7, 4.6)
    panel = figure.subplots()
    layers = range(layout.depth + 1)
    for number, (name, plan) in enumerate(plans.items()):
        left = [layout.tokens, *(count.out for count in plan.counts(layout))]
        style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}
        panel.plot(layers, left, label=name, **style)
    panel.axhline(layout.prefix, color=INK, linewidth=0.8, linestyle=":")
    panel.set_ylim(0, None)
    panel.set_xlabel("layers", fontsize=LABEL)
    panel.set_ylabel("tokens left", fontsize=LABEL)
    panel.legend(fontsize=SMALL, frameon=False)
    figure.suptitle("Tokens left after every layer", fontsize=TITLE)
    save(figure, path)
