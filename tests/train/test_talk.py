"""Training a vision-language model: the objective, the job with plans in turn, stages."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.data.grid_kinds import KINDS
from tokred.data.grid_questions import GridQuestions
from tokred.methods import make_plan
from tokred.models import VLM, DecoderConfig, ViTConfig, VLMConfig
from tokred.report import Call
from tokred.train.config import load_config
from tokred.train.inputs import make_inputs
from tokred.train.job import run_job, train
from tokred.train.setup import make_setup
from tokred.train.start import starting_weights
from tokred.train.talk import TalkObjective

RECIPES = Path(__file__).parents[2] / "configs"
QUIET = ("log.progress=False", "log.tensorboard=False")
VISION = ViTConfig(
    image_size=(16, 16), patch=(4, 4), channels=1, width=16, depth=1, heads=2, classes=0,
    class_token=False, pool="mean",
)  # fmt: skip
CONFIG = VLMConfig(
    vision=VISION,
    decoder=DecoderConfig(vocab=260, width=16, depth=1, heads=2, hidden=24, context=48),
)


def batch_of(rows: int) -> dict[str, jax.Array]:
    task = GridQuestions("test", cells=(2, 2))
    examples = [task.ask(task[i], np.random.default_rng(i)) for i in range(rows)]
    return {name: jnp.stack([e[name] for e in examples]) for name in examples[0]}


def test_sums_count_answers_by_kind_and_evidence_that_is_left():
    batch = batch_of(12)
    plan = make_plan("onedpiece", CONFIG.layout, keep=0.5, site="output")
    objective = TalkObjective(plan, kinds=KINDS)
    model = VLM(CONFIG, plan=plan, rngs=nnx.Rngs(0))
    _, report = objective.run(model, objective.inputs(batch), Call())
    perfect = 50.0 * jax.nn.one_hot(batch["target"], 260)
    sums = objective.sums(perfect, report, batch, CONFIG.layout)
    share = {name: float(value) / float(sums["count"]) for name, value in sums.items()}
    scores = objective.scores(share)
    assert scores["accuracy"] == scores["exact"] == 1.0
    asked = {KINDS[k] for k in np.unique(batch["kind"])}
    groups = asked | {"top", "bottom"}
    assert {n.removeprefix("exact_") for n in scores if n.startswith("exact_")} == groups
    cells = np.asarray(batch["evidence"])[:, 0]  # the first half of the patches: the upper cells
    want = (cells[:, 0].sum(-1) / cells.sum((1, 2))).mean()
    assert scores["recall"] == pytest.approx(want, rel=1e-5)
    top = np.logical_not(cells[:, 1].any(-1))
    assert float(sums["asked_top"]) == top.sum()
    only = jnp.where(jnp.asarray(top)[:, None, None], perfect, 0)
    sums = objective.sums(only, report, batch, CONFIG.layout)
    assert float(sums["exact_top"]) == float(sums["asked_top"])
    assert float(sums["exact_bottom"]) == 0
    wrong = jnp.roll(perfect, 1, axis=-1)
    assert float(objective.sums(wrong, report, batch, CONFIG.layout)["exact"]) == 0


def test_answers_alone_are_learned():
    batch, objective = batch_of(2), TalkObjective(kinds=KINDS)
    model = VLM(CONFIG, rngs=nnx.Rngs(0))
    logits, _ = objective.run(model, objective.inputs(batch), Call())
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["target"][..., None], -1)[..., 0]
    want = (each * batch["weight"]).sum() / batch["weight"].sum()
    found = objective.fit(logits, (batch["target"], batch["weight"]))
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.slow
def test_a_matryoshka_job_goes_on_from_a_dense_one_and_aligns_first(tmp_path: Path):
    run_job(load_config(str(RECIPES / "grid_dense.py:smoke"), QUIET), tmp_path / "dense")
    changes = (*QUIET, "train.each=(1, 4)", "align.steps=2", f"start_from={tmp_path / 'dense'}")
    config = load_config(str(RECIPES / "grid_mqt.py:smoke"), changes)
    rows = run_job(config, tmp_path / "mqt")
    assert {row["method"] for row in rows} == {"dense", "mqt"}
    assert all(0 <= row["exact"] <= 1 for row in rows)


@pytest.mark.slow
def test_a_part_starts_from_a_run_of_its_own(tmp_path: Path):
    images = load_config(str(RECIPES / "digits_dense.py:smoke"), QUIET)
    alone = make_setup(images)
    trained = train(alone, make_inputs(images, alone.model, alone.mesh), tmp_path)
    config = load_config(str(RECIPES / "grid_mqt.py:smoke"), QUIET)
    with config.unlocked():
        config.model.vision.update({**images.model, "classes": 0})
        config.start_parts.vision = str(tmp_path)
    setup = make_setup(config)
    fresh, found = setup.init().params, starting_weights(setup).params
    for name, value in fresh.items():
        own = name.removeprefix("vision/")
        want = value if own == name or "reductions/" in name else trained.params[own]
        np.testing.assert_array_equal(found[name], want, err_msg=name)


def test_the_first_stage_trains_the_connector_alone():
    changes = (*QUIET, "align.steps=2", "train.each=(1, 4)")
    setup = make_setup(load_config(str(RECIPES / "grid_mqt.py:smoke"), changes))
    align, train = setup.stages
    assert (align.name, train.name) == ("align", "train")
    names = setup.shapes.params
    connector = {n for n in names if n.startswith(("projector/", "vision/reductions/"))}
    assert set(align.names(names)) == connector
    assert set(train.names(names)) == set(names)


def test_the_second_stage_may_leave_a_part_as_it_is():
    changes = (*QUIET, "align.steps=2", "train.each=(1, 4)", "train.trainable=^(?!vision/blocks)")
    setup = make_setup(load_config(str(RECIPES / "grid_mqt.py:smoke"), changes))
    names = set(setup.shapes.params)
    frozen = names - set(setup.stages[-1].names(setup.shapes.params))
    assert frozen == {n for n in names if n.startswith("vision/blocks")}
