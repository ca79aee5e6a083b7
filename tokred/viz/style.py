"""What all pictures share: a figure without global state, colours, the text sizes."""

from os import PathLike
from typing import Any

# Okabe and Ito's colours, which colour-blind readers tell apart, without black (gone, dense).
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
# One more marker than colours, so that the pairs repeat only after 56 methods.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
INK, FAINT = "#222222", "#9A9A9A"
DPI = 160
TITLE, LABEL, SMALL = 12, 10, 9


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, in inches; it belongs to no window and needs no closing.

    Raises ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "tokred.viz draws with matplotlib, which is not installed: pip install matplotlib."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: str | PathLike) -> None:
    """Writes the figure in the format that the ending of the path names."""
    figure.savefig(path, dpi=DPI)
