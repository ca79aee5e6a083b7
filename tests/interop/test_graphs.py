"""Functions of models as files: what they compute, written and run where tokred is not known."""

import dataclasses
import importlib.util
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from tokred import (
    VLM,
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    ViT,
    ViTConfig,
    VLMConfig,
    generate,
    make_plan,
)  # fmt: skip
from tokred.interop.graphs import verify_graphs, write_graphs
from tokred.interop.portable import functions_of

VIT = ViTConfig(image_size=(32, 32), patch=(8, 8), width=16, depth=3, heads=2, classes=5)
TEXT = DecoderConfig(vocab=260, width=16, depth=3, heads=2, context=32)
PAIRS = EncoderDecoderConfig(
    context=32, width=16, depth=3, decoder_depth=1, heads=2, head_dim=8, hidden=32, sink=True
)
TALK = VLMConfig(
    ViTConfig(image_size=(32, 32), patch=(8, 8), width=16, depth=2, heads=2, classes=0),
    DecoderConfig(vocab=260, width=16, depth=2, heads=2, context=64),
)
ONNX = pytest.mark.skipif(
    importlib.util.find_spec("jax2onnx") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="needs the extra export: jax2onnx and onnxruntime",
)


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Runtime checks know no batch without a size."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def made(kind, config, method, **options):
    plan = make_plan(method, config.layout, **options)
    return kind(config, plan=plan, rngs=nnx.Rngs(0)), plan


def portable(name: str, batch: int | None = None) -> list:
    if name in ("tome", "evit", "diffrate"):
        return functions_of(*made(ViT, VIT, name))
    if name == "mod":
        return functions_of(
            *made(Decoder, TEXT, "mod", keep=0.5, gate="predictor"), tokens=8, steps=4
        )
    if name == "mrt5":
        return functions_of(*made(EncoderDecoder, PAIRS, "mrt5", keep=0.5, layer=1))
    model, _ = made(VLM, TALK, "mqt", length=8)
    plans = {m: make_plan("mqt", TALK.layout, length=m) for m in (1, 4, 8)}
    return [functions_of(model, p, batch=batch, suffix=f"_{m}")[0] for m, p in plans.items()]


CASES = ("tome", "evit", "diffrate", "mod", "mrt5", "mqt")
SLOW = [c if c == "mod" else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize("name", SLOW)
def test_stablehlo_runs_without_tokred(name: str, tmp_path):
    functions = portable(name)
    write_graphs(functions, tmp_path, "stablehlo", {"method": name})
    worst = verify_graphs(tmp_path)
    assert set(worst) == {f.name for f in functions} and max(worst.values()) <= 1e-5
    told = json.loads((tmp_path / "metadata.json").read_text())
    inputs = told["functions"][functions[0].name]["inputs"]
    assert inputs["ids" if name in ("mod", "mrt5") else "images"]["shape"][0] == "batch"


@ONNX
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_onnx_runs_without_tokred(name: str, tmp_path):
    batch = 2 if name == "mqt" else None  # jax2onnx takes its queries for the batch
    write_graphs(portable(name, batch), tmp_path, "onnx", {"method": name})
    assert max(verify_graphs(tmp_path).values()) <= 1e-4
    assert jnp.cumsum(jnp.ones(3), 0)[-1] == 3  # jax is as it was


def test_prefill_and_steps_write_what_generate_writes():
    model, plan = made(Decoder, TEXT, "mod", keep=0.5, gate="predictor")
    prefill, step = functions_of(model, plan, tokens=8, steps=4)
    ids = jax.random.randint(jax.random.key(0), (2, 8), 3, 100)
    expected = generate(model, ids, steps=4, plan=plan)
    out = prefill.call(ids)
    logits = out["logits"][:, -1]
    for i in range(4):
        np.testing.assert_allclose(logits, expected.logits[:, i], atol=1e-5)
        cache = [out[name] for name in step.inputs if name != "ids"]
        out = step.call(logits.argmax(-1).astype(jnp.int32)[:, None], *cache)
        logits = out["logits"][:, 0]


def test_an_encoder_keeps_what_the_model_keeps():
    model, plan = made(EncoderDecoder, PAIRS, "mrt5", keep=0.5, layer=1)
    (encode,) = functions_of(model, plan)
    ids = encode.example(batch=3)["ids"]
    memory, _ = model.encode(jnp.asarray(ids), plan=plan)
    found = encode.call(ids)
    np.testing.assert_array_equal(found["memory"], memory.x)
    assert found["memory"].shape[1] == 16 == found["valid"].shape[1]


def test_a_file_that_says_something_else_is_refused(tmp_path):
    (function,) = portable("tome")
    write_graphs([function], tmp_path, "stablehlo", {})
    stored = dict(np.load(tmp_path / "example.npz"))
    stored["logits/out/logits"] += 1
    np.savez(tmp_path / "example.npz", **stored)
    with pytest.raises(ValueError, match="differs from the model by"):
        verify_graphs(tmp_path)
    (tmp_path / "logits.stablehlo").write_bytes(b"no")
    with pytest.raises(ValueError, match="does not run in a fresh process"):
        verify_graphs(tmp_path)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(TypeError, match="is none of ViT, Decoder"):
        functions_of(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="kind 'tflite' must be one of"):
        write_graphs([], tmp_path, "tflite", {})


def test_the_model_that_was_given_stays_as_it_is():
    scanned = dataclasses.replace(VIT, scan=True)
    model, plan = made(ViT, scanned, "topk")
    (logits,) = functions_of(model, plan, batch=2)
    assert model.config is scanned
    images = logits.example()["images"]
    np.testing.assert_allclose(
        logits.call(images)["logits"], model(jnp.asarray(images), plan=plan)[0], atol=1e-6
    )
