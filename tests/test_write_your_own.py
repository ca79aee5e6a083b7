"""The README's own method: short, complete, and held to every property."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.checks import CHECKS, run_check
from tests.methods_table import NO_TWIN, Row
from tokred.methods import list_methods, registry

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- write-your-own:start -->", "<!-- write-your-own:end -->"
ROW = Row(
    "norm",
    left=6,
    easy={"keep": 0.7},
    hard={"keep": 0.4},
    but_one={"keep": 0.99},
    exempt=NO_TWIN,
)


def block() -> str:
    text = README.read_text()
    assert text.count(START) == text.count(END) == 1, f"README.md needs {START} and {END} once"
    return text.split(START)[1].split(END)[0].split("```python\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def own() -> Iterator[str]:
    """Registers the method of the README for this module only."""
    code = block()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_METHODS", dict(registry._METHODS))
        exec(compile(code, str(README), "exec"), {"__name__": "own"})
        yield code


def test_it_is_short_and_registered(own: str):
    assert len(own.strip().splitlines()) <= 40
    assert list_methods()[-1].name == ROW.method


@pytest.mark.parametrize("name", CHECKS[ROW.model])
@pytest.mark.usefixtures("own")
def test_property(name: str):
    run_check(name, ROW)
