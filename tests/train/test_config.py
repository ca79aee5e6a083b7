"""Recipes, overrides, and the sentences that wrong ones get."""

import json

import pytest

from tokred.train.cli import Arguments
from tokred.train.config import default_config, from_json, load_config, model_config, to_json
from tokred.train.setup import make_setup

RECIPES = [
    "digits_diffrate",
    "digits_dense",
    "digits_dynamicvit",
    "mrt5_mod_bytes",
    "grid_rates",
    "cifar10_vit",
    "vit_s16_imagenet_dense",
    "vit_s16_imagenet_diffrate",
    "vit_s16_imagenet_evit",
    "vit_s16_imagenet_tome",
]
DIGITS = "configs/digits_dense.py:smoke"


@pytest.fixture(autouse=True)
def at_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_make_a_model_and_survive_json(name):
    config = load_config(f"configs/{name}.py")
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert model_config(again) == model_config(config)
    steps = {s.name: s.steps for s in make_setup(load_config(f"configs/{name}.py:smoke")).stages}
    assert steps["train"] == 4 and max(steps.values()) == 4


def test_overrides_take_the_type_of_the_field():
    overrides = [
        "optimizer.lr=1",
        "model.patch_kernel=4",
        "evaluate.methods=tome,evit",
        "log.progress=False",
        "train.options.keep=0.5",
        "train.method=evit",
    ]
    config = load_config(DIGITS, overrides)
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.model.patch_kernel == 4
    assert tuple(config.evaluate.methods) == ("tome", "evit")
    assert config.log.progress is False
    assert config.train.options.keep == 0.5


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.lrr=1", "did you mean 'lr'"),
        ("optimzer.lr=1", "did you mean 'optimizer'"),
        ("optimizer.lr.x=1", "has no fields"),
        ("optimizer.lr=abc", "must be float"),
        ("model.depth=2.5", "must be int"),
        ("train.steps=True", "must be int"),
        ("optimizer.lr", "has no value"),
    ],
)
def test_wrong_overrides_get_one_sentence(override, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config(DIGITS, [override])


def test_wrong_recipes_get_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"did you mean 'configs/digits_dense\.py'"):
        load_config("configs/digits_dence.py")
    with pytest.raises(ValueError, match="':smoke'"):
        load_config("configs/digits_dense.py:smok")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from tokred.train.config import default_config\n"
        "def get_config(arg=''):\n"
        "    config = default_config()\n"
        "    config.optimizer.lrate = 1.0\n"
        "    return config\n"
    )
    with pytest.raises(ValueError, match="sets a field that does not exist"):
        load_config(str(wrong))
    wrong.write_text("x = 1\n")
    with pytest.raises(ValueError, match="no get_config"):
        load_config(str(wrong))


def test_wrong_dtypes_and_two_learned_methods_are_named():
    config = default_config()
    config.model.param_dtype = "float23"
    with pytest.raises(ValueError, match=r"config\.model\.param_dtype"):
        model_config(config)
    with pytest.raises(ValueError, match=r"config\.rates\.steps=0"):
        make_setup(load_config(DIGITS, ["train.method=dynamicvit", "rates.steps=1"]))


def test_unknown_arguments_get_one_sentence():
    parser = Arguments()
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    assert parser.read(["--config=a", "--config.b.c=1"])[1] == ["b.c=1"]
    with pytest.raises(ValueError, match="did you mean '--workdir'"):
        parser.read(["--workdr=a"])
