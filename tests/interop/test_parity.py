"""Every family against transformers: the same files, the same answers, and the same files back.

The answers under frozen/ were made by freeze.py (transformers 5.23, torch 2.13, float32); the tier
`parity` makes them again with the packages that it finds.
"""

import filecmp
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokred
from tokred.interop import FAMILIES, Loaded

FROZEN = Path(__file__).parent / "frozen"
NAMES = sorted(path.name for path in FROZEN.iterdir())
TOLERANCE = 1e-4
Answers = dict[str, Any]


def answers_of(directory: Path) -> Answers:
    with np.load(directory / "answers.npz") as file:
        return {name: jnp.asarray(array) for name, array in file.items()}


def pixels(images: jax.Array) -> jax.Array:
    """torch's [B C Y X] as [B Y X C]."""
    return images.transpose(0, 2, 3, 1)


def see(loaded: Loaded, given: Answers) -> Answers:
    image, model = pixels(given["in_image"]), loaded.model
    if "out_logits" in given:
        return {"out_logits": loaded(image)[0]}
    found = {"out_states": model.encode(model.tokens(image))[0].x}
    if "in_large" in given and loaded.origin is not None:
        large = pixels(given["in_large"])
        model = tokred.load(loaded.origin.directory, image_size=large.shape[1:3]).model
        found["out_large_states"] = model.encode(model.tokens(large))[0].x
    return found


def read(loaded: Loaded, given: Answers) -> Answers:
    return {"out_logits": loaded(given["in_ids"], valid=given["in_valid"] > 0)[0]}


def encode(loaded: Loaded, given: Answers) -> Answers:
    how = {"valid": given["in_valid"] > 0}
    states = loaded.model.encode(given["in_ids"], **how)[0].x
    return {"out_states": states, "out_pooled": loaded(given["in_ids"], **how)[0]}


def match(loaded: Loaded, given: Answers) -> Answers:
    return {"out_logits": loaded(pixels(given["in_image"]), given["in_ids"])[0]}


def translate(loaded: Loaded, given: Answers) -> Answers:
    ids, targets = given["in_ids"], given["in_target"]
    return {"out_logits": loaded(ids, targets, valid=given["in_valid"] > 0)[0]}


def talk(loaded: Loaded, given: Answers) -> Answers:
    """The placeholder is the fourth id; transformers answers behind each of its 16 patches."""
    ids = jnp.insert(given["in_ids"], 3, loaded.model.config.image_id, axis=1)
    logits = loaded(ids, pixels(given["in_image"])[:, None])[0]
    text = np.delete(np.arange(given["out_logits"].shape[1]), np.arange(3, 18))
    given["out_logits"] = given["out_logits"][:, text]
    return {"out_logits": logits}


def talk_of_crops(loaded: Loaded, given: Answers) -> Answers:
    """The same for an overview and two crops of an image of 13 x 40, which take 34 places."""
    config = loaded.model.config
    ids = jnp.insert(given["in_ids"], 3, config.image_id, axis=1)
    plan = tokred.make_plan("anyres", config.layout, crops=(1, 2), size=(13, 40))
    logits = loaded.model(ids, pixels(given["in_image"])[None], plan=plan)[0]
    text = np.delete(np.arange(given["out_logits"].shape[1]), np.arange(3, 3 + 33))
    given["out_logits"] = given["out_logits"][:, text]
    return {"out_logits": logits}


ASK: dict[str, Callable[[Loaded, Answers], Answers]] = {
    **dict.fromkeys(NAMES, read), "t5": translate, "bert": encode,
    "llava": talk, "llava_next": talk_of_crops,
    **dict.fromkeys(("clip", "siglip"), match),
    **dict.fromkeys((n for n in NAMES if n.startswith(("vit", "deit", "dino", "clip_"))), see),
}  # fmt: skip


def compare(name: str, directory: Path) -> None:
    given = answers_of(directory)
    found = ASK[name](tokred.load(directory), given)
    wanted = {key for key in given if key.startswith("out_")}
    assert set(found) == wanted
    for key in wanted:
        keep = slice(None)
        if key in ("out_logits", "out_states") and "in_valid" in given:
            keep = given["in_valid"][:, : given[key].shape[1]] > 0 if name != "t5" else keep
        np.testing.assert_allclose(found[key][keep], given[key][keep], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_answers_as_transformers(name: str):
    compare(name, FROZEN / name)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_files_back(name: str, tmp_path: Path):
    tokred.save(tokred.load(FROZEN / name), tmp_path)
    assert filecmp.cmp(tmp_path / "model.safetensors", FROZEN / name / "model.safetensors", False)
    texts = [json.loads((p / "config.json").read_text()) for p in (tmp_path, FROZEN / name)]
    assert texts[0] == texts[1]


def test_every_family_is_tried():
    types = {
        json.loads((FROZEN / name / "config.json").read_text())["model_type"] for name in NAMES
    }
    untried = {t for family in FAMILIES for t in family.types} - types
    # The first two are T5 by other names; the last has only the one model, see tests/fidelity.
    assert untried == {"mt5", "mrt5", "siglip_vision_model", "dinov2_saliency"}


def test_a_tower_alone_is_the_pair_s(tmp_path: Path):
    """SigLIP's vision tower, cut out of the pair's file."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(FROZEN / "siglip" / "model.safetensors")
    own = {k: v for k, v in tensors.items() if k.startswith("vision_model.")}
    save_file(own, tmp_path / "model.safetensors")
    settings = json.loads((FROZEN / "siglip" / "config.json").read_text())["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    image = pixels(answers_of(FROZEN / "siglip")["in_image"])
    tower, pair = tokred.load(tmp_path).model, tokred.load(FROZEN / "siglip").model
    tokens = tower.encode(tower.tokens(image))[0]
    np.testing.assert_allclose(tower.features(tokens), pair.see(image)[0], atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_answers_made_again(name: str, tmp_path: Path):
    """With the installed transformers: its files, and its answers to ours."""
    freeze = pytest.importorskip("tests.interop.freeze", reason="needs torch and transformers")
    freeze.freeze(name, tmp_path / name)
    compare(name, tmp_path / name)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_our_files(name: str, tmp_path: Path):
    freeze: Any = pytest.importorskip("tests.interop.freeze", reason="needs torch, transformers")
    shutil.copy(FROZEN / name / "answers.npz", tokred.save(tokred.load(FROZEN / name), tmp_path))
    for key, wanted in freeze.answer(name, tmp_path).items():
        np.testing.assert_allclose(answers_of(tmp_path)[key], wanted, atol=TOLERANCE, rtol=0)
