"""Encoder-decoders beside the dense one: which passes there are, and what their rows say."""

import dataclasses

import pytest

from tokred.cost import macs
from tokred.cost.bench_decoder import Passes
from tokred.cost.bench_pairs import bench_pairs
from tokred.methods import make_plan
from tokred.models import EncoderDecoderConfig

CONFIG = EncoderDecoderConfig(
    vocab=20, width=16, depth=2, decoder_depth=1, heads=2, head_dim=8, hidden=24, context=16,
    target_context=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    passes = Passes(train=True, decode=True, steps=3)
    how = {"tokens": 16, "batch": 2, "rounds": 1, "keep": 0.5}
    return bench_pairs(CONFIG, ["mrt5"], passes=passes, **how)


def test_rows_by_pass(rows):
    both = ("dense", "mrt5")
    wanted = [("encode", m) for m in both] + [("encode, buckets", "mrt5")]
    wanted += [(kind, m) for kind in ("generate", "train") for m in both]
    assert [(row["pass"], row["method"]) for row in rows] == wanted


def test_costs_of_passes(rows):
    of = {(row["pass"], row["method"]): row for row in rows}
    plan = make_plan("mrt5", CONFIG.layout, keep=0.5)
    encoder = dataclasses.replace(CONFIG, decoder_depth=0, target_context=0)
    assert of["encode", "mrt5"]["macs"] == macs(encoder, plan)
    assert of["encode, buckets", "mrt5"]["macs_ratio"] < 0.8
    assert of["generate", "dense"]["macs"] == macs(dataclasses.replace(CONFIG, target_context=3))
    assert of["train", "mrt5"]["macs_ratio"] > 1  # a soft gate saves nothing
    buckets = of["encode, buckets", "mrt5"]
    assert buckets["ms_ratio"] == buckets["ms"] / of["encode", "dense"]["ms"]
