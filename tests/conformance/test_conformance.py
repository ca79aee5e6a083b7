"""Every registered method has every property."""

from typing import Any

import pytest

from tests.conformance.checks import CHECKS, run_check
from tests.methods_table import ELSEWHERE, ROWS, Row
from tokred.methods import list_methods

STORED = ("dense", "diffrate", "mod_decoder", "mqt_vit_grid", "mrt5_pairs")


def case(row: Row, name: str) -> Any:
    # What learns nothing has the dense model's weights, and modules of one kind lie in one tree.
    again = name == "survives_checkpointing" and row.name not in STORED
    marks = pytest.mark.slow if again or row.slow else ()
    return pytest.param(row, name, id=f"{row.name}-{name}", marks=marks)


CASES = [case(row, name) for row in ROWS for name in CHECKS[row.model]]


def test_every_method_has_a_row():
    rows = {row.method for row in ROWS}
    assert not rows & set(ELSEWHERE)
    assert rows | set(ELSEWHERE) == {method.name for method in list_methods()}


def test_exemptions_name_checks():
    assert [n for row in ROWS for n in row.exempt if n not in CHECKS[row.model]] == []


@pytest.mark.parametrize(("row", "name"), CASES)
def test_property(row: Row, name: str):
    run_check(name, row)
