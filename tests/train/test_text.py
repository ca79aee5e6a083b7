"""Training on text: the objective, the job from recipe to routing picture, equal compute."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.models import Decoder, DecoderConfig
from tokred.report import Call
from tokred.train.config import default_config, load_config, model_config
from tokred.train.families import find_family
from tokred.train.isoflop import at_equal_macs, step_macs
from tokred.train.job import evaluate_job, run_job
from tokred.train.text import TextObjective, bits_per_byte

RECIPES = Path(__file__).parents[2] / "configs"
QUIET = ("log.progress=False", "log.tensorboard=False")
CONFIG = DecoderConfig(vocab=259, width=16, depth=2, heads=2, context=8)


def recipe(name: str) -> str:
    return str(RECIPES / f"{name}.py:smoke")


def batch_of(weight: list[list[float]]) -> dict[str, jax.Array]:
    rows = np.asarray(weight, np.float32)
    ids = np.random.default_rng(0).integers(3, 259, (2, *rows.shape))
    place = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    batch = {"input": ids[0], "target": ids[1], "weight": rows, "position": place}
    return {k: jnp.asarray(v) for k, v in {**batch, "document": np.zeros_like(place)}.items()}


def test_the_loss_is_the_mean_over_weighted_tokens_alone():
    batch = batch_of([[1, 1, 0, 0], [0, 0, 0, 1]])
    model, objective = Decoder(CONFIG, rngs=nnx.Rngs(0)), TextObjective()
    logits, report = objective.run(model, objective.inputs(batch), Call())
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["target"][..., None], -1)[..., 0]
    wanted = (each[0, 0] + each[0, 1] + each[1, 3]) / 3
    found = objective.fit(logits, (batch["target"], batch["weight"]))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    first = {**batch, "valid": jnp.array([True, False])}
    sums = objective.sums(logits, report, first, CONFIG.layout)
    assert float(sums["count"]) == 2
    np.testing.assert_allclose(sums["loss"], each[0, 0] + each[0, 1], rtol=1e-5)


def test_metrics_tell_macs_of_the_sequence_and_the_loss_of_the_gate():
    plan = make_plan("mod", CONFIG.layout, keep=0.5)
    model, objective = Decoder(CONFIG, plan=plan, rngs=nnx.Rngs(0)), TextObjective(plan)
    loss, (metrics, _) = objective(model, batch_of([[1.0] * 8]), jax.random.key(0), {}, {})
    assert 0.5 < float(metrics["macs_ratio"]) < 1
    assert float(metrics["around_1/loss_gate"]) > 0
    np.testing.assert_allclose(loss, metrics["cross_entropy"] + metrics["around_1/loss_gate"])


def test_padding_and_documents_are_left_out_only_where_they_cannot_be():
    batch = batch_of([[1.0] * 4])
    assert TextObjective().inputs(batch).valid is None
    padded = {**batch, "position": batch["position"].at[0, 3].set(-1)}
    inputs = TextObjective(padded=True, documents=False).inputs(padded)
    assert inputs.valid.tolist() == [[True, True, True, False]] and inputs.document is None


def test_bits_per_byte():
    assert bits_per_byte(np.log(4.0), 2.0) == pytest.approx(1.0)


@pytest.mark.slow
def test_a_recipe_runs_resumes_and_is_evaluated_from_its_checkpoint(tmp_path: Path):
    config = load_config(recipe("lm_bytes_mod"), QUIET)
    rows = {row["method"]: row for row in run_job(config, tmp_path)}
    assert set(rows) == {"dense", "mod", "mod causal"}
    assert rows["mod"]["macs_ratio"] < 0.7 and rows["dense"]["macs_ratio"] == 1
    for row in rows.values():
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / np.log(2))
    assert 0 < rows["mod"]["agreement"] <= 1
    assert (tmp_path / "routing.html").exists() and (tmp_path / "routing.png").exists()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert run_job(config, tmp_path)[1]["loss"] == rows["mod"]["loss"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    again = {row["method"]: row for row in evaluate_job(tmp_path)}
    assert again["mod"]["loss"] == pytest.approx(rows["mod"]["loss"], rel=1e-6)


def test_diagnostics_run_too(tmp_path: Path):
    more = ("data.name=needle", "data.packed=False", "model.vocab=64", "evaluate.rounds=1")
    config = load_config(recipe("lm_bytes_dense"), (*QUIET, *more))
    [row] = run_job(config, tmp_path)
    assert row["method"] == "dense" and "bits_per_byte" not in row


def test_recipes_at_equal_compute():
    kinds = ("dense", "mod", "mod_random", "pmod", "hnet")
    configs = at_equal_macs([str(RECIPES / f"lm_bytes_{kind}.py") for kind in kinds], ())
    spent = [step_macs(config) * config.train.steps for config in configs]
    np.testing.assert_allclose(spent, spent[0], rtol=1e-3)
    assert all(config.train.steps > configs[0].train.steps for config in configs[1:])


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ("model.vocab=100", "set config.model.vocab=259"),
        ("data.length=64", "config.model.context=64"),
        ("data.name=nothing", "nothing"),
    ],
)
def test_data_that_does_not_fit(field: str, match: str, tmp_path: Path):
    config = load_config(recipe("lm_bytes_dense"), (*QUIET, field))
    with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
        run_job(config, tmp_path)
    assert "\n" not in str(error.value)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'text'"):
        find_family("txt")


def test_every_field_of_the_model_can_be_set():
    config = default_config("text")
    assert json.dumps(config.model.to_dict()) and model_config(config).hidden == 1408
