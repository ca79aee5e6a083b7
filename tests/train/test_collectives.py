"""Devices that train under a reduction say what they say under the dense model, and no more."""

import functools
from typing import Any

import pytest

from tests.conformance.setting import DENSE, odd, training
from tests.methods_table import ROWS, Row, phases
from tokred.plan import Plan
from tokred.train.collectives import count_activation_gathers, count_collectives
from tokred.train.mesh import BATCH_AXES, make_mesh
from tokred.train.pods import abstract_model, lower_step, objective_of

BATCH = 256
QUICKLY = {"xla_backend_optimization_level": 0}
TRAINED = [
    r for r in ROWS if r.method != "dense" and r.extra in (None, phases)
]  # of batches' fields


@functools.cache
def kinds(config: Any, plan: Plan) -> set[str]:
    """Kinds of collectives of a train step on four parts of data by two of the weights."""
    mesh = make_mesh((4, 2), BATCH_AXES)
    step = lower_step(config, objective_of(config, plan), mesh, BATCH)
    text = step.compile(QUICKLY).as_text()
    assert count_activation_gathers(text, abstract_model(config, plan)[1]) == 0
    return set(count_collectives(text))


@pytest.mark.parametrize(
    "config", dict.fromkeys(odd(row) for row in TRAINED), ids=lambda c: type(c).__name__
)
def test_dense_training_gathers_weights_and_sums_gradients(config: Any):
    assert kinds(config, DENSE) == {"all-gather", "all-reduce"}


# One of each kind; `make test-slow` runs the others, whose gradients conformance looks at too.
QUICK = (("vit", "topk"), ("vit", "diffrate"), ("decoder", "mod"))


def params() -> list:
    slow = lambda row: () if (row.model, row.method) in QUICK else pytest.mark.slow  # noqa: E731
    name = lambda row: f"{row.model}-{row.method}"  # noqa: E731
    return [pytest.param(row, id=name(row), marks=slow(row)) for row in TRAINED]


@pytest.mark.parametrize("row", params())
def test_reductions_add_no_kind_of_collective(row: Row):
    assert kinds(odd(row), training(row)) == kinds(odd(row), DENSE)
