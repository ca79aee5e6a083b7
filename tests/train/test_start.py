"""Where a run starts: at its own checkpoint, from another run, or with a teacher."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tokred.train.config import load_config
from tokred.train.inputs import make_inputs
from tokred.train.job import find_place, require_writable, train
from tokred.train.setup import make_setup, restore_setup
from tokred.train.start import starting_weights

OVERRIDES = [
    "log.progress=False",
    "log.tensorboard=False",
    "log.every=1",
    "data.threads=0",
    "rates.steps=0",
]


@pytest.fixture(autouse=True)
def at_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def go(workdir, *more, allow_changes=False):
    """(weights, lines of the log) of a small run."""
    config = load_config("configs/digits_diffrate.py:smoke", [*OVERRIDES, *more])
    setup = make_setup(config)
    inputs = make_inputs(config, setup.model, setup.mesh)
    weights = train(setup, inputs, workdir, allow_changes=allow_changes)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return weights, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def dense(tmp_path_factory, request):
    """(workdir, weights, lines) of a dense run of 4 steps that averages its weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        workdir = tmp_path_factory.mktemp("dense")
        return workdir, *go(workdir, "optimizer.ema=0.9", "checkpoint.latest=5")


def test_rates_are_learned_on_the_averaged_weights_of_another_run(dense, tmp_path):
    more = [f"start_from={dense[0]}", "train.steps=0", "rates.steps=2"]
    weights, lines = go(tmp_path, *more)
    assert [(line["stage"], line["step"]) for line in lines] == [("rates", 1), ("rates", 2)]
    _, averaged = restore_setup(dense[0])
    for name, value in dense[1].params.items():
        np.testing.assert_array_equal(averaged.params[name], value, err_msg=name)
        np.testing.assert_array_equal(weights.params[name], value, err_msg=name)
    assert any(name.startswith("reductions/") for name in weights.params)


def test_a_run_of_another_width_is_no_start(dense, tmp_path):
    with pytest.raises(ValueError, match=r"another model.*should be float32\[32\].*\[16\]"):
        go(tmp_path, f"start_from={dense[0]}", "model.width=32")


def test_an_empty_start_takes_an_earlier_one_back():
    config = load_config("configs/digits_diffrate.py:smoke", ["start_from=x", "start_from="])
    setup = make_setup(config)
    fresh, started = setup.init(), starting_weights(setup)
    for name, value in fresh.params.items():
        np.testing.assert_array_equal(started.params[name], value, err_msg=name)


@pytest.mark.slow
def test_a_teacher_comes_from_another_run(dense, tmp_path):
    more = ["train.method=evit", "train.options.keep=0.5", "distill.features=0.5"]
    _, lines = go(tmp_path, f"distill.workdir={dense[0]}", *more)
    assert all(line["distill_logits"] > 0 and line["distill_features"] > 0 for line in lines)


@pytest.mark.parametrize(
    "mesh", [("mesh.shape=8", "mesh.axes=data"), ("mesh.shape=4,2", "mesh.axes=data,fsdp")]
)
def test_a_run_goes_on_on_another_mesh(dense, tmp_path, mesh):
    """The mesh is no part of what must not change."""
    copied = shutil.copytree(dense[0], tmp_path / "copy")
    shutil.rmtree(copied / "checkpoints" / "4")
    _, lines = go(copied, "optimizer.ema=0.9", *mesh)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[:2] == dense[2][:2]
    np.testing.assert_allclose(
        [line["loss"] for line in lines], [line["loss"] for line in dense[2]], atol=1e-6
    )


def test_changed_fields_are_named_unless_allowed(dense, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer\.ema=0\.9 \(now 0\.5\), .*--allow-changes"):
        go(dense[0], "optimizer.ema=0.5", "optimizer.lr=0.1")
    copied = shutil.copytree(dense[0], tmp_path / "copy")
    shutil.rmtree(copied / "checkpoints" / "4")
    _, lines = go(copied, "optimizer.ema=0.5", "optimizer.lr=0.1", allow_changes=True)
    assert lines[:2] == dense[2][:2] and lines[3]["loss"] != dense[2][3]["loss"]


def test_an_address_is_no_workdir():
    with pytest.raises(ValueError, match=r"workdir gs:/bucket/run is an address.*mount"):
        require_writable(Path("gs://bucket/run"))


def test_the_place_in_the_data_counts_samples():
    config = load_config("configs/digits_dense.py", ["data.batch=16"])
    data = {"place": {"next_index": 10}, "samples": 320}
    assert find_place(config, data)["next_index"] == 20
