"""All checks by name."""

import importlib
from collections.abc import Callable

import pytest

from tests.conformance import THEMES
from tests.methods_table import Row

Checks = dict[str, Callable[[Row], None]]


def checks_of(model: str) -> Checks:
    """Those that hold on this model."""
    modules = [importlib.import_module(f"tests.conformance.{theme}") for theme in THEMES[model]]
    return {
        name.removeprefix("check_"): function
        for module in modules
        for name, function in vars(module).items()
        if name.startswith("check_")
    }


CHECKS = {model: checks_of(model) for model in THEMES}


def run_check(name: str, row: Row) -> None:
    """Skips, with the table's reason, what the row is exempt from."""
    if name in row.exempt:
        pytest.skip(f"{row.name}: {row.exempt[name]}")
    CHECKS[row.model][name](row)
