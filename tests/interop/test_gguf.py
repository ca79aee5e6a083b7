"""A Llama in a GGUF file answers as from safetensors."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import tokred
from tests.interop.test_parity import FROZEN, answers_of
from tokred.interop.families import Source
from tokred.interop.gguf import GGUF, NAMES, SETTINGS

gguf = pytest.importorskip("gguf", reason="needs the library gguf")
LLAMA = FROZEN / "llama"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp stores queries and keys: the two halves of a head, channel by channel."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def written(path: Path, kind: str = "llama") -> Path:
    settings = Source(LLAMA).settings
    writer = gguf.GGUFWriter(path, kind)
    theirs = {**SETTINGS, "rope_theta": "rope.freq_base"}
    values = {**settings, "rope_theta": settings["rope_parameters"]["rope_theta"]}
    for ours, name in theirs.items():
        whole = isinstance(values[ours], int)
        (writer.add_uint32 if whole else writer.add_float32)(f"{kind}.{name}", values[ours])
    for name, array in load_file(LLAMA / "model.safetensors").items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        array = array if heads is None else interleaved(array, heads)
        writer.add_tensor(llama_cpp(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_cpp(name: str) -> str:
    head, tail = name.rsplit(".", 1)
    number = next((part for part in head.split(".") if part.isdigit()), "")
    known = {ours.replace("{i}", number): theirs.replace("{i}", number)
             for theirs, ours in NAMES.items()}  # fmt: skip
    return f"{known[head]}.{tail}"


def test_the_same_answers(tmp_path: Path):
    loaded, given = tokred.load(written(tmp_path / "tiny.gguf")), answers_of(LLAMA)
    logits = loaded(given["in_ids"], valid=given["in_valid"] > 0)[0]
    keep = given["in_valid"] > 0
    np.testing.assert_allclose(logits[keep], given["out_logits"][keep], atol=1e-4, rtol=0)


def test_it_can_be_written_as_safetensors(tmp_path: Path):
    loaded = tokred.load(written(tmp_path / "tiny.gguf"))
    again = tokred.load(tokred.save(loaded, tmp_path / "out"))
    ids = jnp.asarray(answers_of(LLAMA)["in_ids"])
    np.testing.assert_array_equal(again(ids)[0], loaded(ids)[0])


def test_other_architectures_and_files(tmp_path: Path):
    with pytest.raises(ValueError, match="holds a 'mamba'; only"):
        tokred.load(written(tmp_path / "mamba.gguf", "mamba"))
    (tmp_path / "text.gguf").write_bytes(b"no such file" * 9)
    with pytest.raises(ValueError, match="is no GGUF file"):
        tokred.load(tmp_path / "text.gguf")
    with pytest.raises(ValueError, match="a tokenizer of kind"):
        GGUF(written(tmp_path / "tiny.gguf")).tokenizer()
