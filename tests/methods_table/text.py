"""Rows of methods on sequences."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from tests.methods_table.row import NO_TWIN, TRAINED_PACKED, Row
from tokred.methods.atp import ATP
from tokred.methods.blt import BLT
from tokred.methods.dyvte import VisualExit
from tokred.methods.hnet import HNet
from tokred.methods.mrt5 import MrT5

TEXT_ENTERS = {**TRAINED_PACKED, "edge_keep_one": "text always enters"}


def phases(place: Any, prompt: Any) -> Mapping[str, Any]:
    return {"generated": jnp.where(place < prompt, -1, place - prompt)}


def first_two(place: Any, prompt: Any) -> Mapping[str, Any]:
    """Two vision tokens in front of the prompt's text."""
    vision, text = (place >= 0) & (place < 2), (place >= 2) & (place < prompt)
    return {"vision": vision, "text": text, **phases(place, prompt)}


def two_images(place: Any, prompt: Any) -> Mapping[str, Any]:
    """Two images of two tokens each, one behind the other, in front of the prompt's text."""
    vision = (place >= 0) & (place < 4)
    return {"vision": vision, "frame": jnp.where(vision, place // 2, -1)}


WHOLE_PROMPT = {
    "decisions_know_no_future": "a prompt decides as a whole",
    "prefill_may_come_in_pieces": "a prompt decides as a whole",
}
TEXT_STAYS = {**WHOLE_PROMPT, "edge_keep_one": "text stays"}
FULL_PASSES = {
    "cached_decoding_is_the_full_pass": "no cache holds its segments",
    "prefill_may_come_in_pieces": "no cache holds its segments",
    "skipped_tokens_have_no_entry": "no cache holds its segments",
}


TEXT = (
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
        slow=True,
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
        slow=True,
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
        slow=True,
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
        slow=True,
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
        slow=True,
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
    Row(
        "dyvte",
        left=13,
        model="decoder",
        easy={"keep": 0.5, "targets": 2},
        hard={"exit": 1, "targets": 1, "hidden": 8},
        but_one={"exit": 3, "targets": 1},
        padding=lambda layout: VisualExit(True, 2),
        learned=True,
        twins="different",
        exact={"keep": 0.5, "targets": 2, "rule": "plan"},
        extra=first_two,
        exempt={**TEXT_STAYS, "training_twin_learns": "it learns from two runs, by `exit_loss`"},
    ),
    Row(
        "atp",
        left=14,
        model="decoder",
        easy={"keep": 0.25, "targets": 2, "layers": (1, 2), "grid": (1, 2)},
        hard={"keep": 0.6, "room": 0.6, "targets": 1, "standardise": True, "grid": (2, 1)},
        but_one={"targets": 2, "layers": (1,), "shares": (0.5,)},
        padding=lambda layout: ATP(1, 2, 1, grid=(1, 2)),
        learned=True,
        twins="different",
        extra=first_two,
        exempt={**TEXT_STAYS, "soft_is_packed": "its gates do not saturate"},
    ),
    Row(
        "hnet",
        left=15,
        model="decoder",
        easy={"keep": 0.6},
        hard={"keep": 0.7, "spans": ((0, 3), (1, 2)), "positions": "renumber"},
        but_one={"keep": 0.93},
        padding=lambda layout: HNet(0.5),
        merges=True,
        learned=True,
        trains="packed",
        twins="exact",
        exact={"keep": 0.6, "spans": ((0, 3), (1, 2))},
        exempt={
            **TRAINED_PACKED,
            **FULL_PASSES,
            "nothing_removed_is_identity": "its way back mixes chunks",
        },
    ),
    Row(
        "blt",
        left=15,
        model="decoder",
        easy={"keep": 0.6, "threshold": 1.0},
        hard={"keep": 0.5, "span": (0, 2), "rule": "both", "pool": "mean"},
        but_one={"keep": 0.93},
        padding=lambda layout: BLT(0.5),
        merges=True,
        twins="exact",
        exact={"keep": 0.6, "threshold": 1.0},
        extra=lambda place, prompt: {"entropy": 0.5 * (7 * place % 5)},
        exempt={
            **FULL_PASSES,
            "training_twin_learns": "it learns nothing",
            "nothing_removed_is_identity": "its way back copies patches",
        },
    ),
    Row(
        "mrt5",
        left=7,
        model="pairs",
        easy={"keep": 0.5},
        hard={"keep": 0.4, "positions": "renumber", "layer": 1, "coefficient": 0.1},
        but_one={"keep": 0.94, "layer": 1},
        padding=lambda layout: MrT5(capacity=1.0),
        learned=True,
        twins="different",
        exact={"keep": 0.5, "corrected": True, "capacity": 1.0},
    ),
    Row(
        "llavolta",
        left=13,
        model="decoder",
        easy={"stride": 2, "images": (2, 2), "layer": 1},
        hard={"keep": 0.5, "images": (2, 2), "positions": "official"},
        but_one={"stride": 2, "images": (1, 2)},
        nothing={"stride": 1},
        merges=True,
        twins="exact",
        exact={"stride": 2, "images": (2, 2), "layer": 1},
        extra=two_images,
        exempt={
            **TEXT_STAYS,
            "training_twin_learns": "it learns nothing",
            "skipped_tokens_have_no_entry": "merged tokens share an entry",
        },
    ),
)
