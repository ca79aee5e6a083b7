"""Notebooks run from top to bottom, with fewer steps; each opens in Colab and holds no output."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
FEWER = {"STEPS": 12, "MORE": 6, "ROUNDS": 1}
LONGEST = 600  # seconds a cell
everyone = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path: Path, kind: str) -> list[dict[str, Any]]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def smaller(source: str, runs: Path) -> str:
    """Counts of steps are replaced, recipes are tried at their smoke size, runs go to `runs`."""
    source = re.sub(r'(configs/\w+\.py)"', r'\1:smoke"', source)
    for name, count in FEWER.items():
        source = re.sub(rf"^{name} = \d+", f"{name} = {count}", source, flags=re.MULTILINE)
    return re.sub(r'^RUNS = Path\("runs', f'RUNS = Path("{runs}', source, flags=re.MULTILINE)


def test_there_are_notebooks():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers == [f"{number:02d}" for number in range(1, len(NOTEBOOKS) + 1)]


@everyone
def test_it_opens_in_colab(path: Path):
    first = "".join(cells_of(path, "markdown")[0]["source"])
    assert first.startswith("# ") and "colab.research.google.com" in first
    assert f"colab/{path.name}" in first


@everyone
def test_it_installs_in_one_cell(path: Path):
    install, *others = ["".join(cell["source"]) for cell in cells_of(path, "code")]
    assert "git" in install and "pip" in install
    assert not any("pip install" in line and "print" not in line for line in others)


@everyone
def test_it_holds_no_output(path: Path):
    for cell in cells_of(path, "code"):
        assert not cell["outputs"] and cell["execution_count"] is None


@pytest.mark.notebook
@everyone
def test_notebook_runs(path: Path, tmp_path: Path):
    client = pytest.importorskip("nbclient", reason="run: make notebooks")
    import nbformat  # pyright: ignore[reportMissingImports]

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = smaller(cell.source, tmp_path)
    here = {"metadata": {"path": str(ROOT)}}
    client.NotebookClient(notebook, timeout=LONGEST, resources=here).execute()
    code = "".join("".join(cell["source"]) for cell in cells_of(path, "code"))
    assert bool(list(tmp_path.rglob("*.png"))) == ("RUNS" in code)
