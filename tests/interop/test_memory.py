"""Loading never holds a second copy of the weights."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

WIDTH, HIDDEN, DEPTH, VOCAB = 512, 1408, 8, 8000
# Anonymous memory while another thread watches: files mapped into memory are not copies.
MEASURE = """
import sys, threading, time
import jax, jax.numpy as jnp
from flax import nnx
import tokred

def used():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Anonymous")) * 1024

jnp.zeros(3).block_until_ready()
before, peak, done = used(), [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], used())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
model = tokred.load(sys.argv[1]).model
done.append(1)
thread.join()
size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
print((peak[0] - before) / size)
"""


def llama(directory: Path) -> Path:
    """Random weights of about 125 MB."""
    draw = lambda *shape: np.random.default_rng(0).random(shape, np.float32)  # noqa: E731
    tensors = {"model.embed_tokens.weight": draw(VOCAB, WIDTH), "model.norm.weight": draw(WIDTH)}
    shapes = {f"self_attn.{n}_proj": (WIDTH, WIDTH) for n in "qkvo"}
    shapes |= {f"mlp.{n}_proj": (HIDDEN, WIDTH) for n in ("gate", "up")}
    shapes |= {"mlp.down_proj": (WIDTH, HIDDEN)}
    norms = {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    for layer in range(DEPTH):
        for name, shape in (shapes | norms).items():
            tensors[f"model.layers.{layer}.{name}.weight"] = draw(*shape)
    save_file(tensors, directory / "model.safetensors")
    settings = {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": HIDDEN,
        "num_hidden_layers": DEPTH, "num_attention_heads": 8, "num_key_value_heads": 8,
        "vocab_size": VOCAB, "max_position_embeddings": 128, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.slow
def test_loading_peaks_below_1_3_times_the_weights(tmp_path: Path):
    command = [sys.executable, "-c", MEASURE, str(llama(tmp_path))]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(ran.stdout) < 1.3
