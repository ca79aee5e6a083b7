"""Training an encoder-decoder that deletes: the objective, the job, the controller in the loop."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.models import EncoderDecoder, EncoderDecoderConfig
from tokred.report import Call
from tokred.train import seeds
from tokred.train.config import load_config
from tokred.train.inputs import make_inputs
from tokred.train.job import evaluate_job, run_job, train
from tokred.train.seq2seq import Seq2SeqObjective
from tokred.train.setup import make_setup
from tokred.train.start import starting_weights

RECIPES = Path(__file__).parents[2] / "configs"
QUIET = ("log.progress=False", "log.tensorboard=False")
CONFIG = EncoderDecoderConfig(
    vocab=40, width=16, depth=2, decoder_depth=1, heads=2, head_dim=8, hidden=24, context=12,
    target_context=4,
)  # fmt: skip


def recipe(name: str) -> str:
    return str(RECIPES / f"{name}.py:smoke")


def batch_of(rows: int, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    target = rng.integers(3, 40, (rows, 4))
    batch = {
        "input": rng.integers(3, 40, (rows, 12)),
        "input_valid": np.arange(12)[None] < rng.integers(6, 13, (rows, 1)),
        "decoder_input": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "target": target,
        "weight": (np.arange(4)[None] < rng.integers(1, 5, (rows, 1))).astype(np.float32),
    }
    return {name: jnp.asarray(value) for name, value in batch.items()}


def test_the_loss_is_the_mean_over_weighted_targets_alone():
    batch, objective = batch_of(3), Seq2SeqObjective()
    model = EncoderDecoder(CONFIG, rngs=nnx.Rngs(0))
    logits, report = objective.run(model, objective.inputs(batch), Call())
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["target"][..., None], -1)[..., 0]
    wanted = (each * batch["weight"]).sum() / batch["weight"].sum()
    found = objective.fit(logits, (batch["target"], batch["weight"]))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    first = {**batch, "valid": jnp.array([True, False, False])}
    sums = objective.sums(logits, report, first, CONFIG.layout)
    np.testing.assert_allclose(sums["loss"], (each * batch["weight"])[0].sum(), rtol=1e-5)
    assert objective.scores({"correct": 0.5, "loss": 1.0, "exact": 0.0})["deletion_rate"] is None


def test_padding_is_passed_on_only_where_there_is_some():
    batch = batch_of(2)
    assert Seq2SeqObjective(padded=False).inputs(batch).valid is None
    assert Seq2SeqObjective().inputs(batch).valid is batch["input_valid"]


def test_metrics_tell_the_rate_and_the_coefficient():
    plan = make_plan("mrt5", CONFIG.layout).with_twin("soft")
    model, objective = EncoderDecoder(CONFIG, plan=plan, rngs=nnx.Rngs(0)), Seq2SeqObjective(plan)
    names = ("p", "i", "coefficient", "step")
    states = {"before_1": {name: jnp.asarray(0.2) for name in names}}
    _, (metrics, after) = objective(model, batch_of(4), jax.random.key(0), states, {})
    assert 0 < float(metrics["share"]) <= 1 and float(metrics["coefficient"]) == pytest.approx(0.2)
    assert float(metrics["before_1/loss_delete"]) < 0
    assert float(after["before_1"]["p"]) != pytest.approx(0.2)


@pytest.mark.slow
def test_a_recipe_runs_resumes_and_is_evaluated_from_its_checkpoint(tmp_path: Path):
    config = load_config(recipe("mrt5_bytes"), (*QUIET, "train.options.layer=2"))
    rows = {row["method"]: row for row in run_job(config, tmp_path)}
    assert set(rows) == {"dense", "mrt5", "mrt5 soft"}
    assert rows["mrt5"]["macs_ratio"] < 0.9 and rows["mrt5 soft"]["macs_ratio"] > 0.99
    assert rows["dense"]["deletion_rate"] is None and 0 <= rows["mrt5"]["deletion_rate"] < 1
    assert "<!doctype html" in (tmp_path / "deletion.html").read_text()[:20]
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert run_job(config, tmp_path)[1]["loss"] == rows["mrt5"]["loss"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    again = {row["method"]: row for row in evaluate_job(tmp_path)}
    assert again["mrt5"]["loss"] == pytest.approx(rows["mrt5"]["loss"], rel=1e-6)


RUNS = ("whole", "parts")


@pytest.mark.slow
def test_the_controllers_state_goes_on_where_it_stopped(tmp_path: Path):
    same_rate = ("optimizer.schedule=constant", "optimizer.warmup=0.0", "optimizer.end=0.0")
    at_once = ("train.options.delay=0", "evaluate.rounds=1")
    config = load_config(recipe("mrt5_bytes"), (*QUIET, *same_rate, *at_once))
    run_job(config, tmp_path / "whole")
    config.train.steps = 2
    run_job(config, tmp_path / "parts")
    config.train.steps = 4
    run_job(config, tmp_path / "parts", allow_changes=True)
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in RUNS]
    told = [[json.loads(line) for line in each][-1] for each in lines]
    assert told[0]["coefficient"] == told[1]["coefficient"] != 0


def test_weights_of_the_other_softmax_are_refused(tmp_path: Path):
    setup = make_setup(load_config(recipe("mrt5_bytes_dense"), QUIET))
    train(setup, make_inputs(setup.config, setup.model, setup.mesh), tmp_path)
    config = load_config(recipe("mrt5_bytes"), QUIET)
    config.model.sink = False
    config.start_from = str(tmp_path)
    with pytest.raises(ValueError, match=r"model\.sink=True") as error:
        starting_weights(make_setup(config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ("data.length=128", r"context, target_context"),
        ("data.name=nothing", "nothing"),
        ("data.options.mean_spam=3.0", "mean_spam"),
    ],
)
def test_data_that_does_not_fit(field: str, match: str, tmp_path: Path):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=match) as error:
        run_job(load_config(recipe("mrt5_bytes"), (*QUIET, field)), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_recipes_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture):
    both = ",".join(recipe(name) for name in ("mrt5_bytes_dense", "mrt5_bytes"))
    quiet = [f"--config.{field}" for field in QUIET]
    seeds.main([f"--config={both}", f"--workdir={tmp_path}", "--seeds=3", *quiet])
    assert "mrt5_bytes: mrt5 soft" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows][:2] == ["mrt5_bytes_dense: dense", "mrt5_bytes: dense"]
    assert (tmp_path / "mrt5_bytes" / "seed_3" / "deletion.html").exists()


def test_a_missing_controller_is_named_on_resume(tmp_path: Path):
    fixed = ("train.options.coefficient=0.1", "train.steps=2", "evaluate.rounds=1")
    run_job(load_config(recipe("mrt5_bytes"), (*QUIET, *fixed)), tmp_path)
    config = load_config(recipe("mrt5_bytes"), QUIET)
    with pytest.raises(ValueError, match=r"controllers/before_3/") as error:
        run_job(config, tmp_path, allow_changes=True)
    assert "\n" not in str(error.value)
