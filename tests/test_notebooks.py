"""Notebooks run from top to bottom, with fewer steps."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
FEWER = {"STEPS": 12, "MORE": 6}


def code_of(path: Path) -> str:
    """All code cells; counts of steps are replaced, runs go where the test says."""
    cells = json.loads(path.read_text())["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    for name, count in FEWER.items():
        text = re.sub(rf"^{name} = \d+", f"{name} = {count}", text, flags=re.MULTILINE)
    return text


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(ROOT)
    text = re.sub(r'^RUNS = Path\("runs', f'RUNS = Path("{tmp_path}', code_of(path), flags=re.M)
    exec(compile(text, os.fspath(path), "exec"), {"__name__": "notebook"})
    assert list(tmp_path.rglob("*.png"))
