"""Rows of connectors and of nested tokens, on images."""

from typing import Any

from tests.methods_table.row import NO_TWIN, TRAINED_PACKED, Row
from tokred.methods import make_plan
from tokred.methods.c_abstractor import CAbstractor
from tokred.methods.ldp import LDP
from tokred.methods.lookupvit import Compress
from tokred.methods.tokenflex import TokenFlex
from tokred.plan import Layout

STRETCHED = {"padding_changes_no_choice": "its positions stretch over the whole grid"}
NEW = {
    "nothing_removed_is_identity": "its queries take the place of all tokens",
    "packed_twin_does_not_learn": "it learns in both twins",
    "soft_is_packed": "its soft twin is the packed one but for drawn lengths",
    "edge_all_but_one": "its queries form a square or a grid",
}


CELLS = {
    **TRAINED_PACKED,
    "soft_is_packed": "it has no soft twin",
    "nothing_removed_is_identity": "what stays goes through its module",
    "edge_all_but_one": "cells form a grid",
}


def halves(layout: Layout) -> Any:
    """A coarser grid that another with two rows more has too."""
    return {"grid": layout.grid, "cells": (layout.grid[0] // 2, layout.grid[1] // 2)}


def connector(method: str, left: int, **fields: object) -> Row:
    """On a grid of 4 x 6 patches behind a class token."""

    def padding(layout):
        return make_plan(method, layout, **row.easy).at("output")[-1][1]

    given = {"model": "vit_grid", "learned": True, "trains": "packed", "exempt": NEW}
    row = Row(method, left=left, **{**given, "padding": padding, **fields})  # pyright: ignore[reportArgumentType]
    return row


CONNECTORS = (
    Row(
        "flextok",
        left=9,
        easy={"keep": 0.5},
        hard={"keep": 0.4, "latents": 10},
        but_one={"keep": 0.93},
        learned=True,
        twins="different",
        exempt={"soft_is_packed": "its soft twin replaces what the packed one cuts off"},
        slow=True,
    ),
    Row(
        "onedpiece",
        left=9,
        easy={"keep": 0.5},
        hard={"keep": 0.4, "latents": 10},
        but_one={"keep": 0.93},
        twins="exact",
        exact={"keep": 0.5},
        exempt={"training_twin_learns": "it learns nothing"},
        slow=True,
    ),
    connector(
        "mqt",
        left=8,
        easy={"length": 7},
        hard={"length": 5, "side": 3, "look": "tokens"},
        one={"length": 1},
        but_one={"length": 15, "side": 4},
        nothing={"keep": 1.0},
        twins="exact",
        exact={"length": 7},
        unused=r"reductions/output/table",
        exempt={**NEW, **STRETCHED},
    ),
    connector(
        "perceiver",
        left=7,
        easy={"count": 6, "depth": 1},
        hard={"count": 3, "depth": 2, "qk_norm": True},
        one={"count": 1, "depth": 1},
        but_one={"count": 23, "depth": 1},
        nothing={"keep": 1.0, "depth": 1},
    ),
    connector(
        "qformer",
        left=7,
        easy={"count": 6, "depth": 1},
        hard={"count": 3, "depth": 3, "causal": True},
        one={"count": 1, "depth": 1},
        but_one={"count": 23, "depth": 1},
        nothing={"keep": 1.0, "depth": 1},
        slow=True,
    ),
    connector(
        "seed",
        left=6,
        easy={"count": 6, "length": 5},
        hard={"count": 3},
        one={"count": 1},
        but_one={"count": 23},
        nothing={"keep": 1.0},
        twins="exact",
        exact={"count": 6, "length": 5},
        slow=True,
    ),
    connector(
        "tokenpacker",
        left=7,
        easy={"window": 2, "levels": (1, 3), "heads": 2},
        hard={"window": 4, "levels": (0, 2), "heads": 1},
        one={"window": 2, "levels": (3,), "heads": 2},
        nothing={"window": 1, "levels": (3,)},
        exempt={
            **NEW,
            "edge_keep_one": "its windows leave one token of a square grid alone",
            "jit_is_no_jit": "its keys are features of earlier layers",
            "padding_changes_no_choice": "its keys are features of earlier layers",
        },
        slow=True,
    ),
    connector(
        "llava_mini",
        left=5,
        easy={"side": 2, "heads": 2},
        hard={"side": 3, "heads": 1},
        one={"side": 1, "heads": 2},
        nothing={"keep": 1.0, "heads": 2},
        exempt={**NEW, **STRETCHED},
        slow=True,
    ),
    connector(
        "llava_uhd",
        left=5,
        easy={"side": 2, "regions": True},
        hard={"side": 3},
        one={"side": 1},
        exempt={**NEW, **STRETCHED},
        slow=True,
    ),
    connector(
        "slime",
        left=5,
        easy={"side": 2},
        hard={"side": 3},
        one={"side": 1},
        exempt={**NEW, **STRETCHED},
        slow=True,
    ),
    connector(
        "vtg_slots",
        left=7,
        easy={"count": 6},
        hard={"count": 3},
        one={"count": 1},
        but_one={"count": 23},
        slow=True,
    ),
    connector(
        "oryx",
        left=7,
        easy={"data": "video"},
        hard={"data": "video_long"},
        one={"data": "video"},
        slow=True,
        exempt={**NEW, "edge_keep_one": "its windows leave one token of a square grid alone"},
    ),
    Row(
        "m3",
        left=2,
        model="vit_square",
        easy={"keep": 0.5},
        hard={"scale": 4},
        merges=True,
        exempt={**NO_TWIN, "edge_all_but_one": "windows form a grid"},
    ),
    connector(
        "pixel_shuffle",
        left=2,
        model="vit_square",
        easy={"keep": 0.5},
        hard={"keep": 0.3, "version": "v1"},
        padding=None,
        merges=True,
        exempt=CELLS,
        slow=True,
    ),
    connector(
        "tokenflex",
        left=7,
        model="vit_mean",
        easy={"keep": 0.5},
        hard={"tokens": 9},
        padding=lambda layout: TokenFlex(**halves(layout), average="adaptive"),
        merges=True,
        exempt=CELLS,
        slow=True,
    ),
    connector(
        "c_abstractor",
        left=8,
        model="vit_mean",
        easy={"keep": 0.5, "depth": 1, "eos": 1},
        hard={"tokens": 4, "depth": 1, "channels": 8, "prenorm": True},
        one={"keep": 0.01, "depth": 1},
        padding=lambda layout: CAbstractor(**halves(layout), depth=1),
        merges=True,
        exempt=CELLS,
        slow=True,
    ),
    connector(
        "ldp",
        left=7,
        model="vit_mean",
        easy={"keep": 0.5},
        hard={"tokens": 4},
        padding=lambda layout: LDP(**halves(layout)),
        merges=True,
        exempt=CELLS,
        slow=True,
    ),
    connector(
        "lookupvit",
        left=7,
        model="vit",
        easy={"keep": 0.4},
        hard={"side": 2, "renorm": True, "hidden": 1.0},
        one={"keep": 0.07},
        padding=lambda layout: Compress(layout.grid, (layout.grid[0] // 2, layout.grid[1] // 2)),
        merges=True,
        exempt={
            **TRAINED_PACKED,
            "soft_is_packed": "it has no soft twin",
            "nothing_removed_is_identity": "it has a second stream",
            "edge_all_but_one": "cells form a grid",
        },
    ),
)
