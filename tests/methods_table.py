"""The one table of methods: a row per registered method, from which every property is tested.

A new method gets a row here and inherits all of `tests/conformance`. Model 'odd' has 3 x 5 patches
and a class token (16 tokens), model 'even' 4 x 4 patches, a class token and two registers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokred.methods.diffrate import DiffRate
from tokred.methods.pooling import Pool
from tokred.methods.tome import ToMe, ToMeKth, ToMeRandom
from tokred.methods.uniform import UniformGrid
from tokred.plan import Layout, Reduction

Options = Mapping[str, Any]

NO_TWIN = {
    "soft_twin_learns": "it learns nothing",
    "soft_is_packed": "it has no soft twin",
}
CHANCE = {"permuted_batch_permutes_result": "draws belong to the place in the batch, by design"}


@dataclass(frozen=True)
class Row:
    """What a method declares of itself.

    easy, hard: options for the models 'odd' and 'even'. left: tokens after the last layer with
    `easy`, prefix included. one, but_one: options that leave one patch token, and all but one, of
    'odd'. nothing: options that remove nothing. padding: the reduction for a grid, whose choice
    among the real tokens is the same when the grid has two padded rows more; by default what
    keep = 8 / patches gives. merges: no valid original gets lost. exact: options with which the
    soft twin equals the packed one. bf16: bound on the difference of logits, in standard
    deviations. exempt: reasons by the name of the check.
    """

    method: str
    left: int
    easy: Options = field(default_factory=dict)
    hard: Options = field(default_factory=dict)
    one: Options = field(default_factory=lambda: {"keep": 0.01})
    but_one: Options = field(default_factory=lambda: {"keep": 0.94, "layers": (1,)})
    nothing: Options = field(default_factory=lambda: {"keep": 1.0})
    padding: Callable[[Layout], Reduction] | None = None
    random: bool = False
    merges: bool = False
    learned: bool = False
    twins: str = "none"
    exact: Options | None = None
    bf16: float = 0.1
    exempt: Mapping[str, str] = field(default_factory=lambda: NO_TWIN)


LAST = {"keep": 0.4, "layers": (3,)}

ROWS = (
    Row(
        "dense",
        left=16,
        merges=True,
        exempt={
            **NO_TWIN,
            "edge_keep_one": "it removes nothing",
            "edge_all_but_one": "it removes nothing",
            "padding_changes_nothing": "it has no reduction",
            "jit_is_no_jit": "it has no reduction",
        },
    ),
    Row("topk", left=6, easy={"keep": 0.7}, hard=LAST),
    Row(
        "random",
        left=6,
        easy={"keep": 0.7},
        hard=LAST,
        random=True,
        exempt={**NO_TWIN, **CHANCE},
    ),
    Row(
        "pooling",
        left=7,
        easy={"keep": 0.5},
        hard={"keep": 0.3},
        padding=lambda layout: Pool(layout.grid, (layout.grid[0] // 2, layout.grid[1] // 2)),
        merges=True,
        exempt={**NO_TWIN, "edge_all_but_one": "cells form a grid"},
    ),
    Row(
        "uniform",
        left=7,
        easy={"keep": 0.5},
        hard={"keep": 0.3},
        padding=lambda layout: UniformGrid(layout.grid, (layout.grid[0] // 2, layout.grid[1] // 2)),
        exempt={**NO_TWIN, "edge_all_but_one": "cells form a grid"},
    ),
    Row(
        "evit",
        left=9,
        easy={"keep": 0.7},
        hard=LAST,
        one={"keep": 0.01, "fuse": False},
        but_one={"keep": 0.93, "fuse": False, "layers": (1,)},
        merges=True,
    ),
    Row(
        "tome",
        left=5,
        easy={"keep": 0.25},
        hard={"r": [0, 0, 3, 99], "proportional": False},
        one={"r": 99},
        but_one={"r": [1]},
        padding=lambda layout: ToMe(4),
        merges=True,
    ),
    Row(
        "tome_random",
        left=5,
        easy={"keep": 0.25},
        hard={"r": [0, 0, 3, 7]},
        one={"r": 99},
        but_one={"r": [1]},
        padding=lambda layout: ToMeRandom(4),
        random=True,
        merges=True,
        exempt={**NO_TWIN, **CHANCE},
    ),
    Row(
        "tome_kth",
        left=8,
        easy={"keep": 0.5},
        hard={"keep": 0.6, "every": 4},
        one={"every": 15},
        padding=lambda layout: ToMeKth(0, True, 2),
        merges=False,  # 15 patches are 7 pairs: the one that is over vanishes, as officially
        exempt={**NO_TWIN, "edge_all_but_one": "it leaves one of each `every`"},
    ),
    Row(
        "dynamicvit",
        left=6,
        easy={"keep": 0.7},
        hard=LAST,
        learned=True,
        twins="exact",
        exact={"keep": 0.7, "eps": 0.0},
        exempt={},
    ),
    Row(
        "diffrate",
        left=5,
        easy={"keep": 0.25},
        hard={"prune": [19, 19, 16, 9], "merge": [19, 19, 12, 7]},
        one={"prune": [16, 9, 5, 3], "merge": [16, 6, 4, 2]},
        but_one={"prune": [16, 16, 16, 16], "merge": [16, 15, 15, 15]},
        padding=lambda layout: DiffRate(layout.prefix + 10, layout.prefix + 6, 16),
        learned=True,
        twins="different",
        exempt={
            "soft_is_packed": "its twins differ by design",
            "sizes_count_originals": "it scales the sizes of merged tokens by their similarity",
        },
    ),
)
