"""Devices that train under a reduction say what they say under the dense model, and no more."""

import functools

import pytest

from tests.conformance.setting import DENSE, ODD, training
from tests.methods_table import ROWS, Row
from tokred.plan import Plan
from tokred.train.losses import Objective
from tokred.train.mesh import make_mesh
from tokred.train.pods import (
    AXES,
    abstract_model,
    count_activation_gathers,
    count_collectives,
    lower_step,
)

BATCH = 256
QUICKLY = {"xla_backend_optimization_level": 0}


@functools.cache
def kinds(plan: Plan) -> set[str]:
    """Kinds of collectives of a train step on four parts of data by two of the weights."""
    mesh = make_mesh((4, 2), AXES)
    text = lower_step(ODD, Objective(plan), mesh, BATCH).compile(QUICKLY).as_text()
    assert count_activation_gathers(text, abstract_model(ODD, plan)[1]) == 0
    return set(count_collectives(text))


def test_dense_training_gathers_weights_and_sums_gradients():
    assert kinds(DENSE) == {"all-gather", "all-reduce"}


@pytest.mark.parametrize("row", [r for r in ROWS if r.method != "dense"], ids=lambda r: r.method)
def test_reductions_add_no_kind_of_collective(row: Row):
    assert kinds(training(row)) == kinds(DENSE)
