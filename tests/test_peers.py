"""The benchmark beside torch: turns, counts, and the same answers on both sides."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import tokred
from benchmarks import cache_peers
from benchmarks.peers import main
from benchmarks.vit_peers import METHODS, compare, counts_of, sizes_of
from tokred.models import DecoderConfig, ViTConfig

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
    assert main(["--model", "lm_10m", "--methods", "dense,tome"]) == 2
    assert "'tome' has no peer here" in capsys.readouterr().err


def test_a_prompt_and_the_tokens_behind_it_are_timed_apart():
    config = DecoderConfig(vocab=40, width=32, depth=2, heads=2, context=40)
    plans = {
        "dense": tokred.make_plan("dense", config.layout),
        "knorm": tokred.make_plan("knorm", config.layout, keep=0.25),
    }
    asked: list[str] = []

    def peer(name: str) -> float:
        asked.append(name)
        return 0.8 if name.endswith("prompt") else 0.4

    rows = cache_peers.compare(config, plans, 2, peer, batch=2, tokens=32, steps=8)
    assert asked == ["dense/prompt", "dense/token", "knorm/prompt", "knorm/token"] * 4
    assert [(row["method"], row["pass"], row["peer_ms"]) for row in rows] == [
        ("dense", "prompt", pytest.approx(800)), ("dense", "token", pytest.approx(50)),
        ("knorm", "prompt", pytest.approx(800)), ("knorm", "token", pytest.approx(50)),
    ]  # fmt: skip
    assert rows[3]["macs_ratio"] < rows[2]["macs_ratio"] == 1
    entries = [row["cache_bytes"] / rows[0]["cache_bytes"] for row in rows]
    assert entries[2] == pytest.approx((0.25 * 32 + 8) / 40, rel=0.1)


@pytest.mark.parity
@pytest.mark.parametrize(
    "method",
    ["dense", "snapkv", "pyramidkv", "expected_attention", "knorm", "keydiff", "cur"],
)
def test_kvpress_writes_the_same_tokens(method: str, tmp_path: Path):
    """lagkv's ranks tie between parts, streaming_llm and tova go on evicting here."""
    side = pytest.importorskip("benchmarks.torch_caches", reason="needs torch and kvpress")
    sizes = DecoderConfig(vocab=600, width=32, depth=2, heads=4, kv_heads=2, context=600)
    model = side.build(cache_peers.sizes_of(sizes) | {"initializer_range": 0.3})
    model.save_pretrained(tmp_path)
    ids = side.torch.stack([side.torch.randperm(600)[:512] for _ in range(2)])  # no ties
    press = side.PRESSES[method](compression_ratio=0.75) if method != "dense" else None
    with side.torch.no_grad():
        cache, logits = side.read(model, ids, press)
        first = logits.argmax(-1)
        wanted = side.torch.cat([first, side.write(model, cache, first, 512, 16)], 1)
    loaded = tokred.load(tmp_path)
    plan = cache_peers.plan_of(loaded.model.config, method, 0.25)
    found = tokred.generate(loaded.model, jnp.asarray(ids), steps=17, plan=plan).ids
    np.testing.assert_array_equal(found, wanted)


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
