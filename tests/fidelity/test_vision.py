"""Heatmaps of a small model with random weights."""

import jax
import numpy as np
import pytest
from flax import nnx

from tokred.fidelity import compare_heatmaps
from tokred.models import DenseViT, DenseViTConfig, ViTConfig

VISION = ViTConfig(image_size=(16, 16), patch=(4, 4), width=16, depth=2, heads=2, classes=0)
IMAGES = np.asarray(jax.random.normal(jax.random.key(0), (2, 16, 16, 3)))


@pytest.fixture(scope="module")
def model() -> DenseViT:
    return DenseViT(DenseViTConfig(VISION, channels=(8,)), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def rows(model: DenseViT) -> dict:
    found = compare_heatmaps(model, IMAGES, ["tome"], [1.0, 0.8, 0.1], rounds=1)
    return {(row["method"], row["budget"]): row for row in found}


def test_the_dense_model_is_the_measure(rows: dict):
    assert next(iter(rows)) == ("dense", None)
    for row in (rows["dense", None], rows["tome", 1.0], rows["random", 1.0]):
        assert row["correlation"] == row["iou"] == row["encoder_ratio"] == row["macs_ratio"] == 1
        assert row["cosine"] == pytest.approx(1)


def test_smaller_budgets_cost_less_and_lose_something(rows: dict):
    for name in ("tome", "random", "uniform", "pooling"):
        row = rows[name, 0.8]
        assert row["encoder_ratio"] <= 0.8 and row["encoder_ratio"] < row["macs_ratio"] < 1
        assert row["cosine"] < 1 and row["correlation"] < 1
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]


def test_what_is_out_of_reach_says_so(rows: dict):
    row = rows["random", 0.1]
    assert "cannot cost 0.1" in row["why"] and row["correlation"] is row["ms"] is None


@pytest.mark.parametrize(
    ("methods", "budgets", "match"),
    [
        (["tme"], [0.5], "method 'tme' is unknown; did you mean 'tome'"),
        (["dynamicvit"], [0.5], "'dynamicvit' has to be trained first"),
        (["h2o"], [0.5], "'h2o' does not fit this DenseViT"),
        (["tome"], [0.5, 1.5], r"budgets \[0.5, 1.5\] must be shares in \(0, 1\]"),
        (["tome"], [0.0], "must be shares"),
        (["tome"], [], "must be shares"),
    ],
)
def test_bad_input(model: DenseViT, methods: list, budgets: list, match: str):
    with pytest.raises(ValueError, match=match):
        compare_heatmaps(model, IMAGES, methods, budgets)
