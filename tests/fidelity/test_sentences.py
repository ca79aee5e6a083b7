"""Sentences of a small BERT."""

import numpy as np
import pytest

import tokred
from tests.interop.test_parity import FROZEN
from tokred.fidelity import compare_sentences

IDS = np.random.default_rng(0).integers(0, 50, (5, 10))


@pytest.fixture(scope="module")
def rows() -> dict:
    model = tokred.load(FROZEN / "bert").model
    found = compare_sentences(model, IDS, ["tome"], [1.0, 0.7], rounds=1)
    return {(row["method"], row["budget"]): row for row in found}


def test_the_dense_model_is_the_measure(rows: dict):
    for row in (rows["dense", None], rows["tome", 1.0]):
        assert row["spearman"] == row["macs_ratio"] == 1 and row["cosine"] == pytest.approx(1)


def test_smaller_budgets_cost_less(rows: dict):
    assert rows["tome", 0.7]["macs_ratio"] <= 0.7
    assert rows["tome", 0.7]["cosine"] < 1
    assert ("random", 0.7) in rows and ("uniform", 0.7) in rows and ("pooling", 0.7) in rows


def test_a_method_that_reads_a_class_token_does_not_fit():
    model = tokred.load(FROZEN / "bert").model
    with pytest.raises(ValueError, match=r"'evit' does not fit this TextEncoder: .*class token"):
        compare_sentences(model, IDS, ["evit"], [0.7])
