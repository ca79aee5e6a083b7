"""The benchmark beside torch: turns, counts, and the same answers on both sides."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import tokred
from benchmarks.peers import METHODS, compare, counts_of, main, sizes_of
from tokred.models import ViTConfig

CONFIG = ViTConfig(image_size=(32, 32), patch=(8, 8), width=32, depth=3, heads=2, classes=5)
FROZEN = Path(__file__).parent / "interop" / "frozen" / "vit"


def test_all_take_turns_and_both_count_the_same_tokens():
    plans = {
        "dense": tokred.make_plan("dense", CONFIG.layout),
        "tome": tokred.make_plan("tome", CONFIG.layout, r=2),
    }
    asked: list[str] = []

    def peer(name: str) -> float:
        asked.append(name)
        return len(asked) * 1e-3

    rows = compare(CONFIG, plans, 2, 3, peer)
    turn = ["dense/eager", "dense/compile", "tome/eager", "tome/compile"]
    assert asked == turn * 5  # two rounds warm up
    assert [row["peer_ms"] for row in rows[:2]] == pytest.approx([13, 14])
    assert rows[2]["macs_ratio"] < rows[0]["macs_ratio"] == 1
    assert counts_of(CONFIG, plans["tome"]) == [15, 13, 11]
    assert sizes_of(CONFIG)["intermediate_size"] == 128


def test_methods_without_a_peer_are_named(capsys):
    assert main(["--methods", "dense,topk"]) == 2
    assert "'topk' has no peer here" in capsys.readouterr().err


@pytest.mark.parity
@pytest.mark.parametrize("method", METHODS)
def test_the_torch_side_computes_the_same(method: str):
    side = pytest.importorskip("benchmarks.torch_vit", reason="needs torch and transformers")
    torch = side.torch
    model = side.tf.ViTForImageClassification.from_pretrained(FROZEN).eval()
    loaded = tokred.load(FROZEN)
    config = loaded.model.config
    options = {"tome": {"r": 3}, "evit": {"keep": 0.7, "layers": (1,)}}.get(method, {})
    plan = tokred.make_plan(method, config.layout, **options)
    with np.load(FROZEN / "answers.npz") as file:
        image = file["in_image"]
    with torch.no_grad():
        wanted = side.forward(model, torch.tensor(image), method, counts_of(config, plan))
    found = loaded.model(jnp.asarray(image.transpose(0, 2, 3, 1)), plan=plan)[0]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_the_sizes_are_json():
    assert json.loads(json.dumps(sizes_of(CONFIG)))["patch_size"] == 8
