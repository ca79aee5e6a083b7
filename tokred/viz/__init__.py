"""Pictures and tables: accuracy against cost, which tokens were kept and merged, results as text.

    plot_pareto(rows, "pareto.png")
    plot_tokens(images, sources, grid=(8, 8), prefix=1, path="tokens.png")
    print(format_table(rows))

Pictures need matplotlib (pip install "tokred[train]"), which is imported when the first is drawn.
"""

from tokred.viz.curves import plot_curves, plot_frontier, plot_lengths
from tokred.viz.deletion import deletion_html, deletion_rates, deletion_text, write_deletion
from tokred.viz.kept import paint_tokens, plot_tokens
from tokred.viz.occupancy import plot_occupancy, plot_schedules
from tokred.viz.pareto import plot_pareto
from tokred.viz.routing import plot_routing, routing_html, routing_text, write_routing
from tokred.viz.table import FIELDS, format_table

__all__ = [
    "FIELDS",
    "deletion_html",
    "deletion_rates",
    "deletion_text",
    "format_table",
    "paint_tokens",
    "plot_curves",
    "plot_frontier",
    "plot_lengths",
    "plot_occupancy",
    "plot_pareto",
    "plot_routing",
    "plot_schedules",
    "plot_tokens",
    "routing_html",
    "routing_text",
    "write_deletion",
    "write_routing",
]
