"""The one table of methods: a row per registered method, from which every property is tested.

A new method gets a row here and inherits all of `tests/conformance`. Of model 'vit', 'odd' has 3 x
5 patches and a class token (16 tokens), 'even' 4 x 4 patches, a class token and two registers. Of
'decoder' and 'experts', which has a mixture of them, 'odd' has 15 tokens, 'even' 16 and windows of
6. All have 4 layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from tokred.methods.diffrate import DiffRate
from tokred.methods.pooling import Pool
from tokred.methods.tome import ToMe, ToMeKth, ToMeRandom
from tokred.methods.uniform import UniformGrid
from tokred.plan import Layout, Reduction

Options = Mapping[str, Any]
# (place of each token in its sequence [B N], length of its prompt [B 1]) -> per-token arrays
Extra = Callable[[Any, Any], Mapping[str, Any]]

NO_TWIN = {
    "training_twin_learns": "it learns nothing",
    "soft_is_packed": "it has no soft twin",
}
CHANCE = {"permuted_batch_permutes_result": "draws belong to the place in the batch, by design"}
TRAINED_PACKED = {"packed_twin_does_not_learn": "it learns through the weights of what enters"}
TEXT_ENTERS = {**TRAINED_PACKED, "edge_keep_one": "text always enters"}


def phases(place: Any, prompt: Any) -> Mapping[str, Any]:
    return {"generated": jnp.where(place < prompt, -1, place - prompt)}


@dataclass(frozen=True)
class Row:
    """What a method declares of itself on a model.

    easy, hard: options for the models 'odd' and 'even'. left: tokens after the last layer with
    `easy`, prefix included. one, but_one: options that leave one token, or let one enter, and all
    but one, of 'odd'. nothing: options that remove nothing. padding: the reduction for a grid,
    whose choice among the real tokens is the same when the grid has two padded rows more; by
    default what keep = 8 / patches gives. merges: no valid original gets lost. trains: the twin
    that learns. unused: the parameters (a regular expression) that get no gradient. exact: options
    with which the soft twin equals the packed one. decode: those for decoding, by default `easy`.
    bf16: bound on the difference of logits, in standard deviations. extra: per-token arrays that
    the method reads. exempt: reasons by the name of the check.
    """

    method: str
    left: int
    model: str = "vit"
    easy: Options = field(default_factory=dict)
    hard: Options = field(default_factory=dict)
    one: Options = field(default_factory=lambda: {"keep": 0.01})
    but_one: Options = field(default_factory=lambda: {"keep": 0.94, "layers": (1,)})
    nothing: Options = field(default_factory=lambda: {"keep": 1.0})
    padding: Callable[[Layout], Reduction] | None = None
    random: bool = False
    merges: bool = False
    learned: bool = False
    trains: str = "soft"
    unused: str = "^$"
    twins: str = "none"
    exact: Options | None = None
    decode: Options | None = None
    bf16: float = 0.1
    extra: Extra | None = None
    exempt: Mapping[str, str] = field(default_factory=lambda: NO_TWIN)

    @property
    def name(self) -> str:
        return self.method if self.model == "vit" else f"{self.method}_{self.model}"


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
            "padding_changes_no_choice": "it has no reduction",
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
    Row(
        "mod",
        left=15,
        model="decoder",
        easy={"keep": 0.3},
        hard={"keep": 0.5, "gate": "predictor"},
        but_one={"keep": 0.94},
        one={"keep": 0.1},
        merges=True,
        learned=True,
        trains="packed",
        twins="exact",
        exact={"keep": 0.3},
        exempt=TRAINED_PACKED,
    ),
    Row(
        "mod",
        left=16,
        easy={"keep": 0.3},
        hard={"keep": 0.5, "gate": "predictor"},
        but_one={"keep": 0.94},
        one={"keep": 0.1},
        merges=True,
        learned=True,
        trains="packed",
        twins="exact",
        exact={"keep": 0.3},
        exempt=TRAINED_PACKED,
    ),
    Row(
        "gammamod",
        left=15,
        model="decoder",
        easy={"keep": 0.6, "layers": (1, 3)},
        hard={"keep": 0.5, "layers": (1, 2), "positions": "keep", "shared": False},
        one={"keep": 0.05, "layers": (1,)},
        but_one={"keep": 0.93, "layers": (1,)},
        nothing={"keep": 1.0, "layers": (1,)},
        merges=True,
        learned=True,
        trains="packed",
        twins="exact",
        exact={"keep": 0.6, "layers": (1, 3)},
        extra=lambda place, prompt: {"protected": place % 5 == 0},
        exempt=TRAINED_PACKED,
    ),
    Row(
        "pmod",
        left=15,
        model="decoder",
        easy={"targets": 4},
        hard={"keep": 0.4, "schedule": "linear"},
        but_one={"keep": 0.75, "highest": 0.75, "lowest": 0.75, "targets": 4},
        merges=True,
        learned=True,
        trains="packed",
        twins="exact",
        exact={"targets": 4},
        extra=lambda place, prompt: {"vision": (place >= 0) & (place < 4)},
        exempt=TEXT_ENTERS,
    ),
    Row(
        "videollm_mod",
        left=15,
        model="decoder",
        easy={"keep": 0.5, "frame_tokens": 2, "frames": 2},
        hard={"keep": 0.5, "frame_tokens": 2},
        but_one={"keep": 0.5, "frame_tokens": 2, "frames": 1},
        merges=True,
        learned=True,
        trains="packed",
        twins="exact",
        exact={"keep": 0.5, "frame_tokens": 2, "frames": 2},
        extra=lambda place, prompt: {
            "frame": jnp.where((place >= 0) & (place < 4), place // 2, -1)
        },
        exempt=TEXT_ENTERS,
    ),
    Row(
        "duo_llm",
        left=15,
        model="decoder",
        easy={"keep": 0.5, "layers": (1, 2)},
        hard={"keep": 0.4, "big": 0.9},
        but_one={"keep": 0.93},
        merges=True,
        learned=True,
        twins="exact",
        exact={"keep": 0.5, "big": 1.0},
        exempt={"packed_twin_does_not_learn": "its budget and its small MLP learn in both"},
    ),
    Row(
        "ima_skip",
        left=15,
        model="decoder",
        easy={"keep": 0.5},
        hard={"mode": "skip_attn", "interval": 1, "phase": "prefill", "prefix": 3},
        one={"mode": "skip_block", "interval": 1, "prefix": 14},
        but_one={"mode": "skip_block", "interval": 1, "prefix": 1},
        merges=True,
        unused="blocks/2/mlp/",
        twins="exact",
        exact={"mode": "skip_attn", "interval": 1, "prefix": 3},
        decode={"mode": "skip_block", "interval": 1, "phase": "decode"},
        extra=phases,
        exempt={"training_twin_learns": "it learns nothing"},
    ),
    Row(
        "router_tuning",
        left=15,
        model="decoder",
        easy={"keep": 0.5},
        hard={"keep": 0.7, "site": "around", "room": 0.9},
        but_one={"keep": 0.93},
        merges=True,
        learned=True,
        twins="different",
        exact={"keep": 0.5, "site": "around_mlp", "room": 1.0},
        exempt={"packed_twin_does_not_learn": "its loss asks for the share in both"},
    ),
    Row(
        "skipdecode",
        left=15,
        model="decoder",
        easy={"keep": 0.5, "steps": 4, "prompt": 7},
        hard={"keep": 0.7},
        one={"most": 4, "least": 3, "steps": 2, "prompt": 0},
        but_one={"most": 4, "least": 3, "steps": 4, "prompt": 12},
        merges=True,
        unused="blocks/1/",
        twins="exact",
        exact={"keep": 0.5, "steps": 4, "prompt": 7},
        extra=phases,
        exempt={"training_twin_learns": "it learns nothing"},
    ),
    Row(
        "acm",
        left=16,
        easy={"keep": 0.6},
        hard={"keep": 0.4, "learners": 3, "rule": "official"},
        merges=True,
        learned=True,
        unused="/mlp/",
        twins="exact",
        exact={"keep": 0.6, "shares": (1.0, 1.0, 1.0, 1.0)},
        exempt={
            "nothing_removed_is_identity": "it replaces the MLP",
            "edge_keep_one": "no token enters the MLP",
            "edge_all_but_one": "no token enters the MLP",
            "packed_twin_does_not_learn": "its learners are part of the network",
            "training_only_sums_gradients": "its loss of diversity compares examples",
        },
    ),
    Row(
        "mcmoe",
        left=15,
        model="experts",
        easy={"keep": 0.8, "beta": 0.7, "tau_high": 0.2},
        hard={"keep": 0.9, "beta": 0.4, "tau_high": 0.1, "kind": "column_mean"},
        nothing={"beta": 0.0, "tau_high": 0.0},
        merges=True,
        twins="none",
        exempt={
            **NO_TWIN,
            "edge_keep_one": "no token leaves",
            "edge_all_but_one": "no token leaves",
            "padding_changes_no_choice": "it has no map; padding_changes_nothing sees its weights",
        },
    ),
)
