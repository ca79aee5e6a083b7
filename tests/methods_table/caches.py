"""Rows of methods that make a decoder's cache smaller; `left` entries are held between steps."""

from collections.abc import Mapping
from typing import Any

from tests.methods_table.row import Row

FOUR = {"budget": 4}
ONCE = {"takes_blocks": "it acts once, after the prompt"}
LAYERS = {"takes_blocks": "layers hold different numbers: methods/test_evictions.py"}
FOLDED = {"takes_blocks": "heads hold different numbers: methods/test_razor.py"}
HEADS = ((True, True), (False, True), (False, False), (True, False))
ALL = {"holds_no_more_than_its_budget": "nothing leaves", "takes_blocks": "nothing leaves"}
CODES = {"with_room_for_all_nothing_changes": "codes differ from what they stand for"}
POOL = {
    "holds_no_more_than_its_budget": "heads hold different numbers: methods/test_evictions.py",
    "holds_entries_of_the_text": "its slots are a pool: methods/test_evictions.py",
}
RING = {"holds_entries_of_the_text": "its slots hold the latest entries alone"}
STREAM = {"holds_entries_of_the_text": "its keys are stored before their rotation"}


def _row(
    method: str, more: Mapping[str, Any] | None = None, exempt: Mapping[str, str] | None = None
) -> Row:
    """Four entries stay; with `more` as options of every plan."""
    more = more or {}
    return Row(
        method, 4, "cache", easy={**FOUR, **more}, nothing={"budget": 15, **more},
        exempt=exempt or {},
    )  # fmt: skip


# fmt: off
CACHES = (
    _row("streaming_llm", {"sinks": 1}, STREAM),
    _row("h2o"),
    _row("observed_attention"),
    _row("tova"),
    _row("snapkv", {"window": 2, "kernel": 3}),
    _row("pyramidkv", {"window": 2, "kernel": 3}, LAYERS),
    _row("expected_attention", {"sinks": 1, "future": 8}),
    _row("knorm"),
    _row("keydiff"),
    _row("cur", {"sinks": 1}),
    _row("adakv", {"window": 2, "kernel": 3}, {**ONCE, **POOL}),
    _row("razor", {"sinks": 1, "heads": HEADS}, {**FOLDED, **POOL}),
    Row(
        "zipcache", 4, "cache", easy={"high": 8, "low": 4}, nothing={"high": 8, "low": 8},
        exempt={**ALL, **RING, **CODES},
    ),
    Row(
        "quest", 4, "cache", easy={"budget": 4, "page": 2, "dense": 1},
        nothing={"budget": 15, "page": 2}, exempt=ALL,
    ),
    Row(
        "kivi", 4, "cache", easy={"bits": 8, "group": 4, "residual": 4},
        nothing={"group": 4, "residual": 12}, exempt={**ALL, **RING},
    ),
    _row("lagkv", {"sinks": 1, "lag": 2}),
)
# fmt: on
