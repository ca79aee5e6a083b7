"""Published weights: answers known from elsewhere."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokred
from tokred.fidelity import compare_pretrained, perplexity
from tokred.fidelity.agreement import pair_cosines
from tokred.fidelity.data import normalised, photographs
from tokred.interop import PACKAGES

pytestmark = pytest.mark.pretrained
TOKENS, PERPLEXITY = 0, 0.0
# Of TEXT, with these four-bit weights.
TOKENS, PERPLEXITY = 66, 6.425
TEXT = (
    "The water cycle describes how water moves on, above and below the surface of the Earth. Water "
    "evaporates from oceans, lakes and rivers, rises into the atmosphere as vapor, and cools and "
    "condenses into clouds. It then falls back to the ground as rain or snow, flows into streams "
    "and rivers, and returns to the ocean."
)


def fetched(name: str) -> Path:
    try:
        return tokred.pretrained(name)
    except (ConnectionError, ImportError) as error:
        pytest.skip(f"{name} cannot be had: {error}")


def test_heatmaps_are_those_of_the_published_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = "saliency_vit_s14"
    runtime = pytest.importorskip("onnxruntime", reason="the published graph needs onnxruntime")
    model = tokred.load(fetched(name)).model
    monkeypatch.setenv("TOKRED_PRETRAINED", str(tmp_path))
    monkeypatch.setitem(PACKAGES, name, dataclasses.replace(PACKAGES[name], convert=None))
    session = runtime.InferenceSession(str(fetched(name)))
    images = normalised(np.stack(list(photographs(224, 2).values())))
    given = session.get_inputs()[0].name
    each = [session.run(None, {given: x.transpose(2, 0, 1)[None]})[0] for x in images]
    ours = jax.nn.sigmoid(model(jnp.asarray(images))[0])[..., 0]
    theirs = np.stack([np.squeeze(x) for x in each])
    if theirs.min() < 0 or theirs.max() > 1:
        theirs = 1 / (1 + np.exp(-theirs))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_what_follows_france():
    loaded = tokred.load(fetched("smollm2_135m_instruct"), context=128)
    source: Any = loaded.origin
    tokenizer = source.tokenizer()
    prompt = jnp.asarray([tokenizer.encode("The capital of France is").ids])
    said = tokred.generate(loaded.model, prompt, steps=6).ids[0]
    assert "Paris" in tokenizer.decode(said.tolist())
    ids = tokenizer.encode(TEXT).ids
    assert len(ids) == TOKENS
    assert float(perplexity(loaded.model, np.asarray([ids]))) == pytest.approx(PERPLEXITY, rel=0.01)


def test_paraphrases_are_closer_than_strangers():
    path = fetched("minilm_l6")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    texts = [
        "A man is playing a guitar on the street.",
        "Someone plays guitar outside.",
        "Quarterly profits fell by six percent.",
    ]
    model = tokred.load(path, pool="mean", tanh=False).model
    rows = [model(jnp.asarray([tokenizer.encode(text).ids]))[0][0] for text in texts]
    alike, strange, other = pair_cosines(np.stack(rows))
    assert alike > 0.6 and strange < 0.2 and other < 0.2


def test_half_the_macs_keep_most_of_a_heatmap():
    fetched("saliency_vit_s14")
    rows, about = compare_pretrained("saliency_vit_s14", ["tome"], [0.5], count=2, rounds=1)
    found = {row["method"]: row for row in rows}
    assert about["inputs"] == ["china", "flower"]
    assert found["tome"]["correlation"] > max(0.9, found["random"]["correlation"])
    assert found["tome"]["encoder_ratio"] <= 0.5
