"""Reductions attached to models that exist, and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokred
from tests.interop.test_parity import FROZEN, answers_of, pixels
from tokred.interop.safetensors import ONE

VIT, LLAMA = FROZEN / "vit", FROZEN / "llama"


def image() -> jax.Array:
    return pixels(answers_of(VIT)["in_image"])


def copy(source: Path, directory: Path, **settings: object) -> Path:
    shutil.copytree(source, directory, dirs_exist_ok=True)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return directory


def test_attached_weights_are_the_models_own():
    dense = tokred.load(VIT)
    merged = tokred.attach(dense, "tome", keep=0.5)
    logits, report = merged(image())
    assert report.tokens.n < 17
    assert merged.model.head.kernel[...] is dense.model.head.kernel[...]
    same = dense.model(image(), plan=merged.plan)[0]
    np.testing.assert_array_equal(logits, same)


def test_layers_of_a_method_and_of_a_reduction():
    by_name = tokred.attach(tokred.load(VIT), "evit", keep=0.5, layers=[1])
    assert [site.layer for site, _ in by_name.plan.steps] == [1]
    reduction = by_name.plan.steps[0][1]
    by_hand = tokred.attach(tokred.load(VIT), reduction, layers=[1])
    assert by_hand.plan.steps == by_name.plan.steps
    with pytest.raises(ValueError, match="needs layers="):
        tokred.attach(tokred.load(VIT), reduction)
    with pytest.raises(ValueError, match="belong to a method's name"):
        tokred.attach(tokred.load(VIT), reduction, layers=[1], keep=0.5)


def test_what_was_learned_comes_back(tmp_path: Path):
    learned = tokred.attach(tokred.load(VIT), "dynamicvit", keep=0.5, layers=(1,), seed=3)
    tokred.save(learned, tmp_path)
    about = json.loads((tmp_path / "reduction.json").read_text())
    assert about["method"] == "dynamicvit"
    assert about["options"] == {"keep": 0.5, "layers": [1]}
    assert [row["out"] for row in about["counts"]] == [17, 9, 9]
    again = tokred.load(tmp_path)
    assert again.plan == learned.plan
    np.testing.assert_array_equal(again(image())[0], learned(image())[0])
    other = tokred.attach(tokred.load(VIT), "dynamicvit", keep=0.5, layers=(1,), seed=4)
    assert np.abs(other(image())[0] - learned(image())[0]).max() > 0


def test_a_plan_by_hand_must_be_passed_again(tmp_path: Path):
    plan = tokred.attach(tokred.load(VIT), "tome", keep=0.5).plan
    tokred.save(tokred.attach(tokred.load(VIT), plan), tmp_path)
    with pytest.raises(ValueError, match="pass it as plan="):
        tokred.load(tmp_path)
    assert tokred.load(tmp_path, plan).plan == plan


def test_changed_weights_are_written(tmp_path: Path):
    loaded = tokred.load(LLAMA)
    loaded.model.embed.embedding[...] = loaded.model.embed.embedding[...] + 1
    ids = jnp.asarray(answers_of(LLAMA)["in_ids"])
    again = tokred.load(tokred.save(loaded, tmp_path))
    np.testing.assert_array_equal(again(ids)[0], loaded(ids)[0])
    with pytest.raises(ValueError, match="another directory"):
        tokred.save(loaded, LLAMA)
    with pytest.raises(ValueError, match="must have been read"):
        tokred.save(tokred.Loaded(loaded.model), tmp_path / "more")


def test_a_resized_model_is_written_and_read_again(tmp_path: Path):
    wide = tokred.load(VIT, image_size=(24, 16))
    images = jax.random.normal(jax.random.key(0), (1, 24, 16, 3))
    again = tokred.load(tokred.save(wide, tmp_path / "wide"))
    assert again.model.config == wide.model.config
    np.testing.assert_array_equal(again(images)[0], wide(images)[0])
    back = tokred.load(tokred.save(again, tmp_path / "again"), image_size=(16, 16))
    assert back.model.config == tokred.load(VIT).model.config


def test_types_and_sizes_by_name():
    loaded = tokred.load(VIT, image_size=(24, 16), param_dtype=jnp.bfloat16)
    assert loaded.model.config.grid == (6, 4)
    assert loaded.model.position[...].shape == (25, 32)
    assert loaded.model.head.kernel[...].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"no field 'image_sise'.*image_size"):
        tokred.load(VIT, image_sise=(24, 16))


def test_placed_where_it_is_asked_for():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def place(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        wide = path.endswith("mlp/fc1/kernel")
        return jax.sharding.NamedSharding(mesh, spec(None, "data") if wide else spec())

    model = tokred.load(VIT, sharding=place).model
    kernel = model.blocks[0].mlp.fc1.kernel[...]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 6)}


def test_what_fits_and_why_not():
    names = ["tome", "dynamicvit", "quest", "evit"]
    rows = {row["method"]: row for row in tokred.what_fits(tokred.load(VIT).model, names)}
    assert rows["tome"]["fits"] and not rows["tome"]["learned"]
    assert rows["dynamicvit"]["fits"] and rows["dynamicvit"]["learned"]
    assert not rows["quest"]["fits"] and rows["quest"]["why"]
    tower = tokred.what_fits(tokred.load(FROZEN / "siglip").model, ["evit"])
    assert not tower[0]["fits"] and "class token" in tower[0]["why"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "llama", "bert", "t5", "llava", "clip"])
def test_every_method_fits_or_says_why(family: str):
    rows = tokred.what_fits(tokred.load(FROZEN / family).model)
    assert any(row["fits"] for row in rows)
    assert all(row["fits"] or row["why"] for row in rows)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "vitt"}, "'vitt' is unknown.*did you mean 'vit'"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"num_hidden_layers": 4}, "16 parameters are not stored: 'blocks/3/"),
        ({"num_hidden_layers": 2}, "16 parameters are stored, but the model lacks them"),
        ({"intermediate_size": 40}, r"the shape \(48,\), the model has \(40,\)"),
    ],
)
def test_settings_that_do_not_fit(change: dict, match: str, tmp_path: Path):
    with pytest.raises(ValueError, match=match) as error:
        tokred.load(copy(VIT, tmp_path, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "swiglu"}, "hidden_act='swiglu'"),
    ],
)
def test_fields_that_are_not_supported_are_named(change: dict, field: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"config.json: {field}.*is not supported"):
        tokred.load(copy(LLAMA, tmp_path, **change))


def test_a_wrong_guess_of_the_family():
    with pytest.raises(ValueError, match=r"family='gpt2' does not fit.*'vit'"):
        tokred.load(VIT, family="gpt2")
    with pytest.raises(ValueError, match="must be one of"):
        tokred.load(VIT, family="resnet")


def test_pickles_are_refused(tmp_path: Path):
    shutil.copy(VIT / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="holds neither"):
        tokred.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"'pytorch_model.bin': such files can run code"):
        tokred.load(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 2000])
def test_files_that_are_cut_off(size: int, tmp_path: Path):
    whole = (copy(VIT, tmp_path) / ONE).read_bytes()
    (tmp_path / ONE).write_bytes(whole[:size])
    with pytest.raises(ValueError, match="cut off, or no safetensors file"):
        tokred.load(tmp_path)


def test_nan_and_unknown_names(tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy(VIT, tmp_path) / ONE)
    bad = tensors | {"classifier.bias": np.full(7, np.nan, np.float32)}
    save_file(bad, tmp_path / ONE)
    with pytest.raises(ValueError, match=r"'classifier.bias' holds NaN"):
        tokred.load(tmp_path)
    many = {f"extra.{i}": np.zeros(1, np.float32) for i in range(12)}
    save_file(tensors | many, tmp_path / ONE)
    with pytest.raises(ValueError, match=r"12 stored names.*'extra.0', 'extra.1'.*, \.\.\.;"):
        tokred.load(tmp_path)
