"""ByT5's stored names: every weight where it belongs, strictly, and a run that starts from them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tokred.interop import Source, is_exported
from tokred.interop.t5 import t5_config
from tokred.models import EncoderDecoder, EncoderDecoderConfig
from tokred.nn.skeleton import split_model
from tokred.train.config import load_config, model_config
from tokred.train.setup import make_setup
from tokred.train.start import starting_weights

RECIPES = Path(__file__).parents[2] / "configs"
QUIET = ("log.progress=False", "log.tensorboard=False")
CONFIG = EncoderDecoderConfig(
    vocab=40, width=16, depth=2, decoder_depth=1, heads=2, head_dim=8, hidden=24, buckets=8,
    max_distance=16, context=12, target_context=4,
)  # fmt: skip
SETTINGS = {
    "model_type": "t5", "feed_forward_proj": "gated-gelu", "vocab_size": 40, "d_model": 16,
    "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 24,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def stored(model: EncoderDecoder) -> dict[str, np.ndarray]:
    """The weights under the names that Hugging Face writes."""
    named = {"shared.weight": model.embed.embedding[...]}
    if model.head is not None:
        named["lm_head.weight"] = model.head.kernel[...].T
    for part, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        named[f"{part}.embed_tokens.weight"] = named["shared.weight"]
        named[f"{part}.final_layer_norm.weight"] = stack.norm.scale[...]
        for i, block in enumerate(stack.blocks):
            at = f"{part}.block.{i}.layer"
            named |= attention(f"{at}.0.SelfAttention", block.attn)
            named[f"{at}.0.layer_norm.weight"] = block.norm1.scale[...]
            if block.cross is not None and block.norm_cross is not None:
                named |= attention(f"{at}.1.EncDecAttention", block.cross)
                named[f"{at}.1.layer_norm.weight"] = block.norm_cross.scale[...]
            last = 1 if block.cross is None else 2
            named[f"{at}.{last}.layer_norm.weight"] = block.norm2.scale[...]
            for theirs, ours in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
                kernel = getattr(block.mlp, ours).kernel[...]
                named[f"{at}.{last}.DenseReluDense.{theirs}.weight"] = kernel.T
        table = stack.blocks[0].relative.table[...]
        named[f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = table
    return {name: np.ascontiguousarray(array) for name, array in named.items()}


def attention(at: str, module: Any) -> dict[str, Any]:
    parts = zip("qkvo", (module.query, module.key, module.value, module.out), strict=True)
    return {f"{at}.{letter}.weight": part.kernel[...].T for letter, part in parts}


def spread(seed: int) -> EncoderDecoder:
    """A model none of whose parameters are alike."""
    model = EncoderDecoder(CONFIG, rngs=nnx.Rngs(seed))
    state = nnx.state(model)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(state))))
    noise = lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape)  # noqa: E731
    nnx.update(model, jax.tree.map(noise, state))
    return model


def write(directory: Path, tensors: dict[str, np.ndarray], files: int = 1, **more: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SETTINGS | more))
    if files == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = [f"model-{i}.safetensors" for i in range(files)]
    where = {name: names[i % files] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: tensors[n] for n, f in where.items() if f == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return directory


def load(directory: Path, config: EncoderDecoderConfig = CONFIG) -> EncoderDecoder:
    model = nnx.eval_shape(lambda: EncoderDecoder(config, rngs=nnx.Rngs(0)))
    skeleton, shapes = split_model(model)
    return skeleton.merge(Source(directory).read(config, shapes.params), shapes.rest)


@pytest.mark.parametrize("files", [1, 3])
def test_every_weight_finds_its_place(files: int, tmp_path: Path):
    model = spread(1)
    assert not is_exported(tmp_path)
    again = load(write(tmp_path, stored(model), files))
    assert is_exported(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_bfloat16_files_give_the_models_own_type(tmp_path: Path):
    tensors = {name: array.astype(jnp.bfloat16) for name, array in stored(spread(1)).items()}
    model = load(write(tmp_path, tensors))
    assert model.embed.embedding[...].dtype == jnp.float32


def test_the_config_of_a_directory():
    config = t5_config(SETTINGS, context=12, target_context=4)
    assert config == CONFIG
    assert t5_config(SETTINGS | {"use_softmax1": True}).sink
    with pytest.raises(ValueError, match="gated-gelu"):
        t5_config(SETTINGS | {"feed_forward_proj": "relu"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("lm_head.weight"), "are not stored: 'head/kernel'"),
        (lambda t: t.update(other=t["shared.weight"]), "belong to no parameter, 'other'"),
        (lambda t: t.update({"shared.weight": t["shared.weight"][:-1]}), r"\(39, 16\)"),
    ],
)
def test_weights_that_do_not_fit(change, match: str, tmp_path: Path):
    tensors = stored(spread(1))
    change(tensors)
    with pytest.raises(ValueError, match=match) as error:
        load(write(tmp_path, tensors))
    assert "\n" not in str(error.value)


def test_another_depth_is_named(tmp_path: Path):
    write(tmp_path, stored(spread(1)))
    with pytest.raises(ValueError, match=r"are not stored: 'encoder/blocks/2/attn/key/kernel'"):
        load(tmp_path, dataclasses.replace(CONFIG, depth=3))


def test_a_run_starts_from_exported_weights(tmp_path: Path):
    config = load_config(str(RECIPES / "mrt5_bytes.py:smoke"), QUIET)
    own = model_config(config)
    model = EncoderDecoder(own, rngs=nnx.Rngs(7))
    directory = write(tmp_path / "given", stored(model), use_softmax1=own.sink)
    config.start_from = str(directory)
    weights = starting_weights(make_setup(config))
    want = split_model(model)[1].params
    assert set(weights.params) - set(want) == {
        f"reductions/before_3/{name}" for name in ("norm/scale", "score/bias", "score/kernel")
    }
    for name, array in want.items():
        np.testing.assert_array_equal(weights.params[name], array, err_msg=name)
    write(directory, stored(model), use_softmax1=not own.sink)
    with pytest.raises(ValueError, match="the same softmax"):
        starting_weights(make_setup(config))
