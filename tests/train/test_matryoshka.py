"""The study of lengths: which models it trains, and a tiny one from end to end."""

import contextlib
import json
from pathlib import Path

import pytest

from tokred.train import finished, matryoshka
from tokred.train.config import load_config
from tokred.train.finished import claim, keep_rows
from tokred.train.matryoshka import Job, answer_all, models
from tokred.train.setup import make_setup

RECIPE = str(Path(__file__).parents[2] / "configs" / "grid_mqt_two_stage.py") + ":smoke"
START = RECIPE.replace("mqt_two_stage", "dense")
QUIET = ["log.progress=False", "log.tensorboard=False"]


def test_there_is_a_model_for_all_lengths_and_one_for_each():
    found = {
        name: (config, asked) for name, config, asked in models(RECIPE, QUIET, (1, 4), ["pooling"])
    }
    assert list(found) == [
        "mqt",
        matryoshka.LONGER,
        "mqt only 1",
        "mqt only 4",
        "pooling",
        *matryoshka.CONDITIONED,
    ]
    nested, asked = found["mqt"]
    assert tuple(nested.train.each) == (1, 4) and nested.train.vary == "length"
    assert [options["length"] for options in asked] == [1, 4]
    fixed, asked = found["mqt only 4"]
    assert tuple(fixed.train.each) == (4,) and fixed.train.vary == "length"
    setup = make_setup(fixed)
    varied = setup.stages[-1].objective.varied
    assert varied is not None and varied.plans[0].twin == "packed"
    assert [setup.model.image_tokens(plan) for plan in varied.plans] == [4]
    assert [options["length"] for options in asked] == [4]
    pooled, asked = found["pooling"]
    assert pooled.train.vary == "keep" and tuple(pooled.train.each) == (1 / 64, 4 / 64)
    assert asked[1] == {"keep": 4 / 64, "site": "output"}
    told = [found[name][0].train for name in matryoshka.CONDITIONED]
    assert [train.options.conditioned for train in told] == [True, False]
    assert all(
        (train.method, train.vary, train.options.keep) == ("quecc", "", 1 / 64) for train in told
    )
    steps = {name: config.train.steps for name, (config, _) in found.items()}
    assert steps.pop(matryoshka.LONGER) == 2 * steps["mqt"]
    assert len({*steps.values()}) == 1


def test_a_run_that_another_process_holds_is_waited_for(tmp_path: Path, monkeypatch):
    started: list[str] = []
    rows = [{"tokens": 1, "exact": 0.5, "macs_ratio": 0.5, "line": "a", "seed": 0}]

    def answer(job: Job):
        started.append(job.name)
        keep_rows(job.workdir / matryoshka.ANSWERS, {}, rows)
        return rows

    monkeypatch.setattr(matryoshka, "answer", answer)
    config, after = (load_config(START, QUIET) for _ in range(2))
    after.start_from = str(tmp_path / "held")
    jobs = [Job("held", config, tmp_path / "held", [{}]), Job("after", after, tmp_path / "b", [{}])]
    jobs.append(Job("free", config, tmp_path / "free", [{}]))
    with contextlib.ExitStack() as other:
        assert other.enter_context(claim(tmp_path / "held"))
        monkeypatch.setattr(finished.time, "sleep", lambda _: other.close())
        assert len(answer_all(jobs, tmp_path)) == 3
    assert started == ["free", "held", "after"]


def test_a_claim_is_one_processes_alone(tmp_path: Path):
    with claim(tmp_path / "new") as first, claim(tmp_path / "new") as second:
        assert first and not second
    with claim(tmp_path / "new") as third:
        assert third


@pytest.mark.slow
def test_a_study_writes_rows_for_every_length(tmp_path: Path, monkeypatch):
    command = [
        f"--config={RECIPE}", f"--start={START}", f"--workdir={tmp_path}", "--seeds=0",
        "--lengths=1,4", "--baselines=uniform", *(f"--config.{change}" for change in QUIET),
    ]  # fmt: skip
    matryoshka.main(command)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    asked = [(row["model"], row["tokens"]) for row in rows]
    assert asked == [
        ("dense", 64), ("mqt", 1), ("mqt", 4), (matryoshka.LONGER, 1), (matryoshka.LONGER, 4),
        ("mqt only 1", 1), ("mqt only 4", 4), ("uniform", 1), ("uniform", 4),
        *((name, 1) for name in matryoshka.CONDITIONED),
    ]  # fmt: skip
    assert all(0 <= row["exact"] <= 1 for row in rows)
    assert (tmp_path / "lengths.png").exists()
    monkeypatch.delattr(matryoshka, "train")  # what is finished needs no training
    (tmp_path / "results.json").unlink()
    matryoshka.main(command)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
