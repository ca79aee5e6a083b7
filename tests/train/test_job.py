"""The main job from end to end on a small model: resume, checkpoints, eval.py's figures."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tokred.train.checkpoint import Checkpoints, check_same
from tokred.train.config import load_config
from tokred.train.inputs import make_inputs
from tokred.train.job import evaluate_job, run_job, train
from tokred.train.log import RunLog
from tokred.train.setup import learned_plan, make_setup, restore_setup

OVERRIDES = [
    "log.progress=False",
    "log.tensorboard=False",
    "data.threads=0",
    "evaluate.methods=tome,random",
]
FIGURES = ("method", "accuracy", "recall", "macs", "macs_ratio")


def recipe(*more):
    return load_config("configs/digits_diffrate.py:smoke", [*OVERRIDES, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """(workdir, rows) of a small job that ran to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        workdir = tmp_path_factory.mktemp("job")
        return workdir, run_job(recipe(), workdir)


@pytest.fixture(autouse=True)
def at_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


def test_the_job_writes_what_it_found(finished):
    workdir, rows = finished
    assert [row["method"] for row in rows] == ["dense", "diffrate", "tome", "random"]
    assert json.loads((workdir / "results.json").read_text())["rows"] == rows
    assert all((workdir / name).stat().st_size for name in ("pareto.png", "tokens.png"))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(x["stage"], x["step"]) for x in lines] == [
        ("train", 2), ("train", 4), ("rates", 2), ("rates", 3)
    ]  # fmt: skip
    budget = rows[1]["macs_ratio"]
    assert all(row["macs_ratio"] <= budget for row in rows[1:])
    assert all(0 <= row["accuracy"] <= 1 and 0 <= row["recall"] <= 1 for row in rows)


def test_the_checkpoint_alone_gives_the_same_figures(finished):
    workdir, rows = finished
    again = evaluate_job(workdir)
    assert [[r[k] for k in FIGURES] for r in again] == [[r[k] for k in FIGURES] for r in rows]


def test_the_checkpoint_carries_the_learned_schedule(finished):
    setup, weights = restore_setup(finished[0])
    with Checkpoints(finished[0], create=False) as checkpoints:
        stored = checkpoints.about()["schedule"]
    plan = learned_plan(setup, weights.params)
    assert plan is not None
    counts = [list(count) for count in plan.counts(setup.layout)]
    assert stored == {"method": "diffrate", "counts": counts}


@pytest.mark.slow
def test_other_budgets_and_methods_on_the_same_weights(finished):
    workdir, rows = finished
    dense, evit = evaluate_job(workdir, methods=["evit"], ratio=0.8)
    assert dense["accuracy"] == rows[0]["accuracy"]
    assert evit["macs_ratio"] <= 0.8
    assert evaluate_job(workdir, methods=["topk"], keep=0.7)[1]["keep"] == 0.7
    with pytest.raises(ValueError, match="one of them"):
        evaluate_job(workdir, keep=0.5, ratio=0.5)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(finished, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    config = recipe()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunLog, "write", _after(3, stop, RunLog.write))
        run_job(config, tmp_path)
    setup = make_setup(config)
    resumed = train(setup, make_inputs(config, setup.model, setup.mesh), tmp_path)
    _, expected = restore_setup(finished[0])
    for name, value in expected.params.items():
        np.testing.assert_array_equal(resumed.params[name], value, err_msg=name)
    lines, expected = ((d / "metrics.jsonl").read_bytes() for d in (tmp_path, finished[0]))
    assert lines == expected


def _after(count, stop, call):
    def counted(*args, **more):
        nonlocal count
        count -= 1
        return (call if count else stop)(*args, **more)

    return counted


def test_a_run_of_another_config_is_refused(finished):
    with pytest.raises(ValueError, match=r"config\.seed=0 \(now 1\)"):
        run_job(recipe("seed=1"), finished[0])


def test_workdirs_without_a_run_are_named(tmp_path):
    for path, sentence in ((tmp_path / "no", "does not exist"), (tmp_path, "is empty")):
        with pytest.raises(FileNotFoundError, match=sentence):
            restore_setup(path)
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(FileNotFoundError, match="not the directory of a tokred run"):
        restore_setup(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        restore_setup(tmp_path)


@pytest.mark.parametrize("item", ["model", "about"])
def test_a_damaged_checkpoint_is_named(copied, item):
    for path in (copied / "checkpoints").glob(f"*/{item}/**/*"):
        if path.is_file() and path.name != "commit_success.txt":
            path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="is damaged"):
        restore_setup(copied)


def test_another_model_is_named_by_its_first_leaf(finished):
    setup = make_setup(recipe("model.mlp_ratio=3.0"))
    sentence = r"'blocks/0/mlp/fc1/bias' should be float32\[48\].*float32\[32\].*model\.mlp_ratio"
    with Checkpoints(finished[0]) as checkpoints, pytest.raises(ValueError, match=sentence):
        checkpoints.model(setup.shapes)


def test_missing_leaves_are_named():
    with pytest.raises(ValueError, match=r"'cls' should be float64\[1\].* it is absent"):
        check_same({"params": {"cls": np.zeros(1)}}, {"params": {}})


def test_data_and_model_must_fit():
    config = recipe("model.classes=7")
    with pytest.raises(ValueError, match=r"config\.model\.classes=10"):
        setup = make_setup(config)
        make_inputs(config, setup.model, setup.mesh)


def test_users_errors_are_one_sentence_and_exit_code_2(tmp_path):
    command = [sys.executable, "eval.py", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: workdir") and done.stderr.count("\n") == 1
