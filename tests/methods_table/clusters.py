"""Rows of clustering and of soft assignment, on images."""

from tests.methods_table.row import LAST, NO_TWIN, Row
from tokred.methods.expedit import Expedit

SOFT = {
    "packed_twin_does_not_learn": "it learns through its weights, in the one form that it has",
    "soft_is_packed": "it has no soft twin",
}

CLUSTERS = (
    Row(
        "dpc_knn",
        left=6,
        easy={"keep": 0.7},
        hard={**LAST, "weight": "score", "neighbours": 3},
        merges=True,
    ),
    Row(
        "k_medoids",
        left=6,
        easy={"keep": 0.7},
        hard={**LAST, "weighted": False},
        merges=True,
        slow=True,
    ),
    Row(
        "expedit",
        left=16,
        easy={"keep": 0.5, "layer": 1, "temperature": 5.0},  # decisive: no tie of belonging
        hard={"keep": 0.3, "layer": 2, "window": 3, "norm": "sum", "back": "label"},
        padding=lambda layout: Expedit(layout.grid, (layout.grid[0] // 2, layout.grid[1] // 2)),
        merges=True,
        exempt={
            **NO_TWIN,
            "edge_keep_one": "the class token enters the span beside one cluster",
            "edge_all_but_one": "clusters start from a grid",
        },
    ),
    Row(
        "patchmerger",
        left=6,
        easy={"keep": 0.7},
        hard={**LAST, "scaled": True},
        merges=True,
        learned=True,
        trains="packed",
        exempt=SOFT,
        slow=True,
    ),
    Row(
        "sinkhorn",
        left=6,
        easy={"keep": 0.7, "eps": 0.1},  # decisive, too
        hard={**LAST, "eps": 1.0, "iterations": 2},
        merges=True,
        learned=True,
        trains="packed",
        exempt=SOFT,
    ),
    Row(
        "sit",
        left=6,
        easy={"keep": 0.7},
        hard={**LAST, "recover": True},
        merges=True,
        learned=True,
        trains="packed",
        exempt=SOFT,
        slow=True,
    ),
    Row(
        "tokenlearner",
        left=6,
        easy={"tokens": 5},
        hard={"keep": 0.3, "layer": 2, "version": "1.0", "fuse": True},
        one={"tokens": 1},
        but_one={"tokens": 14},
        merges=True,
        learned=True,
        trains="packed",
        exempt=SOFT,
        slow=True,
    ),
)
