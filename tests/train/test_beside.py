"""Methods beside the one that is trained: in other parts of the model, under one budget."""

from pathlib import Path

import pytest

from tokred.cost import macs, solve_keep
from tokred.methods import make_plan
from tokred.models import EncoderDecoderConfig, ViTConfig, VLMConfig
from tokred.plan import Plan
from tokred.train.beside import Beside
from tokred.train.config import load_config
from tokred.train.job import run_job
from tokred.train.setup import make_setup

RECIPES = Path(__file__).parents[2] / "configs"
QUIET = ["log.progress=False", "log.tensorboard=False"]
DEPTHS = {"decoder/mod": {"keep": 0.5, "gate": "predictor"}}
PAIRS = EncoderDecoderConfig(
    width=32, depth=4, decoder_depth=2, heads=2, head_dim=16, context=64, target_context=32
)


def recipe(name: str, *changes: str, beside=DEPTHS):
    config = load_config(str(RECIPES / name), [*QUIET, *changes])
    config.beside = beside
    return config


def test_each_acts_in_its_part_behind_those_before():
    config = VLMConfig()
    queries = make_plan("mqt", config.layout, length=4)
    found = Beside(config, {"decoder/pmod": {}, "tome": {"r": 4}, "restore": {}})(queries)
    merging = make_plan("tome", config.layout, r=4) + make_plan("restore", config.layout)
    layout = config.decoder_layout(plan=queries)
    assert layout.images[1] == 4  # tokens of an image, which depths choose among
    want = queries + merging + make_plan("pmod", layout, targets=4)
    assert found.steps == want.steps and found.name == "mqt"
    assert {site.part for site, _ in found.steps} == {"vision", "decoder"}
    assert Beside(PAIRS, {})(Plan()) == Plan()
    assert Beside(PAIRS, DEPTHS)(Plan()).name == "mod"


@pytest.mark.parametrize(
    ("model", "name", "sentence"),
    [
        (ViTConfig(), "decoder/mod", "which ViTConfig lacks"),
        (PAIRS, "encoder/mod", "names the part 'encoder'"),
        (PAIRS, "decoder/mdo", "did you mean 'mod'"),
    ],
)
def test_what_a_model_lacks_is_named(model, name: str, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Beside(model, {name: {}})(Plan())


def test_one_budget_is_for_all():
    beside = Beside(PAIRS, DEPTHS)
    alone, least = solve_keep(PAIRS, "mrt5", 0.8, layer=1)
    both, most = solve_keep(PAIRS, "mrt5", 0.8, layer=1, whole=beside)
    assert most > least and both.name == "mrt5"
    for plan in (alone, both):
        assert 0.75 < macs(PAIRS, plan) / macs(PAIRS) <= 0.8
    assert solve_keep(PAIRS, "mrt5", 1.0, whole=beside)[0].steps[-1] == beside(Plan()).steps[0]


def test_training_solves_for_the_whole_budget():
    config = recipe("mrt5_bytes.py:smoke", "train.macs=0.8")
    config.train.options = {"layer": 1, "capacity": None, "keep": 0.9}  # keep is solved
    setup = make_setup(config)
    plan = setup.stages[-1].objective.plan
    assert {site.part for site, _ in plan.steps} == {"", "decoder"} and plan.twin == "soft"
    assert 0.7 < macs(setup.model, plan.with_twin("packed")) / macs(setup.model) <= 0.8


def test_what_learns_beside_a_plain_method_is_trained():
    config = recipe("mrt5_bytes.py:smoke", beside={"mrt5": {"layer": 1, "coefficient": 1.0}})
    config.train.method, config.train.options = "dense", {}
    setup = make_setup(config)
    learned = {name for name in setup.shapes.params if name.startswith("reductions/")}
    assert learned and learned <= set(setup.stages[-1].names(setup.shapes.params))


def rates_beside(steps: int):
    """Rates of the encoder, learned beside Matryoshka queries and p-MoD."""
    config = load_config(str(RECIPES / "grid_rates.py:smoke"), QUIET)
    config.model.vision.depth, config.rates.steps, config.rates.target = 4, steps, 0.55
    return config


def test_rates_are_learned_alone_in_the_part_they_belong_to():
    setup = make_setup(rates_beside(2))
    train, rates = (stage.names(setup.shapes.params) for stage in setup.stages[-2:])
    assert {name.rpartition("/")[0] for name in rates} == {
        f"vision/reductions/mid_{layer}" for layer in range(1, setup.layout.depth)
    }
    assert "vision/reductions/output/table" in train and "decoder/norm/scale" in train
    plan = setup.stages[-1].objective.plan
    assert {site.part for site, _ in plan.steps} == {"vision", "decoder"} and plan.twin == "soft"


@pytest.mark.slow
def test_a_job_that_learns_rates_for_the_whole_budget(tmp_path: Path):
    rows = {row["method"]: row for row in run_job(rates_beside(100), tmp_path)}
    assert rows["diffrate"]["macs_ratio"] == pytest.approx(0.55, abs=0.02)


@pytest.mark.slow
def test_a_job_with_a_gate_before_and_depths_behind(tmp_path: Path):
    rows = {row["method"]: row for row in run_job(recipe("mrt5_bytes.py:smoke"), tmp_path)}
    alone = make_setup(recipe("mrt5_bytes.py:smoke", beside={}))
    gate = alone.stages[-1].objective.plan.with_twin("packed")
    assert {"dense", "mrt5"} <= rows.keys()
    assert rows["mrt5"]["macs"] < macs(alone.model, gate) < rows["dense"]["macs"]
