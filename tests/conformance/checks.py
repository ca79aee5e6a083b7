"""All checks by name."""

import importlib
from collections.abc import Callable

import pytest

from tests.conformance import THEMES
from tests.methods_table import Row

MODULES = [importlib.import_module(f"tests.conformance.{theme}") for theme in THEMES]
CHECKS: dict[str, Callable[[Row], None]] = {
    name.removeprefix("check_"): function
    for module in MODULES
    for name, function in vars(module).items()
    if name.startswith("check_")
}


def run_check(name: str, row: Row) -> None:
    """Skips, with the table's reason, what the row is exempt from."""
    if name in row.exempt:
        pytest.skip(f"{row.method}: {row.exempt[name]}")
    CHECKS[name](row)
