"""python eval.py --pretrained=NAME, with figures made up."""

import json
from pathlib import Path
from typing import Any

import pytest

import eval as script
from tokred.fidelity import TASKS, command, compare_pretrained
from tokred.fidelity.command import Task, cut

FIELDS = {"ms": 1.0, "ms_low": 0.9, "ms_high": 1.2, "ms_ratio": 1.0, "macs_ratio": 1.0}


def made_up(path: Path, count: int, methods: list, budgets: list, **how: Any) -> Any:
    rows = [{"method": "dense", "budget": None, "why": "", "cosine": 1.0, **FIELDS}]
    for name in methods:
        some = {"method": name, "budget": budgets[0], "why": "", "cosine": 0.5}
        gone = {"budget": budgets[-1], "why": "it is too small", **dict.fromkeys(FIELDS)}
        rows += [some | FIELDS | {"macs_ratio": 0.4}, some | gone | {"cosine": None}]
    rows = [row | {"needles": {"8@0.5": 1.0} if row["cosine"] else {}} for row in rows]
    return rows, {"inputs": count, **how}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(made_up, ("cosine", "macs_ratio", "ms"), ("cosine",), "macs_ratio")
    monkeypatch.setitem(TASKS, "tiny", task)
    monkeypatch.setattr(command, "pretrained", lambda name: Path(name))
    monkeypatch.setitem(command.COUNTS, "tiny", 4)


@pytest.mark.usefixtures("tiny")
def test_a_table_and_a_picture(capsys: pytest.CaptureFixture, tmp_path: Path):
    how = ["--pretrained=tiny", "--methods=a,b", "--budgets=0.5,0.25", f"--workdir={tmp_path}"]
    script.main(how)
    about, head, _, dense, a, low, *rest = capsys.readouterr().out.splitlines()
    assert "pretrained tiny" in about and "inputs 4" in about and "python 3" in about
    assert head.split() == ["method", "cosine", "MACs", "ratio", "ms"]
    assert dense.split() == ["dense", "1.0000", "1.000", "1.00"]
    assert a.split() == ["a", "0.5", "0.5000", "0.400", "1.00"]
    assert low.split() == ["a", "0.25", "–", "–", "–"]
    assert "8@0.5 %" in "\n".join(rest) and "b 0.25: it is too small" in rest
    told = json.loads((tmp_path / "fidelity.json").read_text())
    assert told["rows"][1]["macs_ratio"] == 0.4
    assert (tmp_path / "fidelity.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.usefixtures("tiny")
def test_json(capsys: pytest.CaptureFixture):
    script.main(["--pretrained=tiny", "--methods=a", "--json", "--count=2", "--lengths=8,16"])
    told = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in told["rows"]] == ["dense", "a", "a"]
    assert told["inputs"] == 2 and told["lengths"] == [8, 16]


def test_unknown_weights():
    with pytest.raises(ValueError, match=r"'minilm_16' are unknown.*did you mean 'minilm_l6'"):
        compare_pretrained("minilm_16", ["tome"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--methods=tome"], "--methods goes with --pretrained"),
        (["--pretrained=minilm_l6", "--macs=0.5"], "--macs is not for --pretrained"),
        ([], "--workdir=DIR of a run"),
        (["--pretrained=minilm_l6", "--budgets=half"], "argument --budgets"),
        (["--pretraned=minilm_l6"], "did you mean '--pretrained'"),
    ],
)
def test_bad_arguments(arguments: list[str], match: str):
    with pytest.raises(ValueError, match=match):
        script.main(arguments)


def test_texts_that_are_too_short():
    encode = lambda text: list(range(len(text.split())))  # noqa: E731
    ids, used = cut(encode, ["random", "typing"], 2, 100)
    assert ids.shape == (2, 100) and used == ["random", "typing"]
    with pytest.raises(ValueError, match="0 texts have 100000 tokens, 1 are asked for"):
        cut(encode, ["random"], 1, 100_000)
