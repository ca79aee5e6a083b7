"""`python -m tokred export` of finished runs."""

import json
from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest

from tokred.train.config import load_config
from tokred.train.export import main, read_weights
from tokred.train.job import run_job
from tokred.train.setup import restore_setup

pytestmark = pytest.mark.slow  # a run must be trained first; test_graphs writes untrained models


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    config = load_config("configs/digits_diffrate.py:smoke", ["log.progress=False"])
    config.evaluate.methods = ()
    run_job(config, path)
    return path


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Runtime checks know no batch without a size."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_learned_schedule_as_stablehlo(workdir, tmp_path, capsys):
    main([f"--workdir={workdir}", "--to=stablehlo", f"--out={tmp_path}", "--verify"])
    assert "logits: largest difference" in capsys.readouterr().out
    told = json.loads((tmp_path / "metadata.json").read_text())
    assert told["methods"]["default"]["method"] == "diffrate"
    assert told["methods"]["default"]["macs_ratio"] < 1
    assert told["preprocessing"]["data"] == "digits"
    assert told["functions"]["logits"]["inputs"]["images"]["shape"] == ["batch", 16, 16, 1]


def test_several_budgets_are_several_functions(workdir, tmp_path):
    arguments = [f"--workdir={workdir}", "--to=stablehlo", f"--out={tmp_path}", "--method=topk"]
    main([*arguments, "--budgets=0.5,0.7", "--licence=MIT"])
    told = json.loads((tmp_path / "metadata.json").read_text())
    assert set(told["functions"]) == {"logits_0.5", "logits_0.7"} and told["licence"] == "MIT"
    main([*arguments, "--budgets=0.5,0.7", "--functions=logits_0.7", "--batch=4"])
    told = json.loads((tmp_path / "metadata.json").read_text())
    assert told["functions"]["logits_0.7"]["inputs"]["images"]["shape"][0] == 4
    with pytest.raises(ValueError, match="must be among logits_0"):
        main([*arguments, "--budgets=0.5,0.7", "--functions=logits"])


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_weights_alone(workdir, tmp_path, kind: str, capsys):
    main([f"--workdir={workdir}", f"--to={kind}", f"--out={tmp_path}"])
    _, weights = restore_setup(workdir)
    found = read_weights(tmp_path)
    assert set(found) == set(weights.params)
    for name, value in weights.params.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_weights_are_read_by_another_process(workdir, tmp_path, kind: str, capsys):
    main([f"--workdir={workdir}", f"--to={kind}", f"--out={tmp_path}", "--verify"])
    assert "weights: largest difference 0.0e+00" in capsys.readouterr().out


def test_what_is_not_there_is_named(workdir, tmp_path):
    with pytest.raises(FileNotFoundError):
        main([f"--workdir={tmp_path}", "--to=onnx", f"--out={tmp_path}"])
    with pytest.raises(ValueError, match="method 'tomme' is unknown"):
        main([f"--workdir={workdir}", "--to=onnx", f"--out={tmp_path}", "--method=tomme"])
