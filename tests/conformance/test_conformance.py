"""Every registered method has every property."""

import pytest

from tests.conformance.checks import CHECKS, run_check
from tests.methods_table import ROWS, Row
from tokred.methods import list_methods


def test_every_method_has_a_row():
    assert [row.method for row in ROWS] == [method.name for method in list_methods()]


def test_exemptions_name_checks():
    assert {name for row in ROWS for name in row.exempt} <= set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.method)
def test_property(row: Row, name: str):
    run_check(name, row)
