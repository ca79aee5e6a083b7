"""Small random models of transformers, their files and what they answer: the truth of the parity
tests. Needs torch and transformers, and no tokred:

python tests/interop/freeze.py DIR [FAMILY ...]

Writes DIR/FAMILY/{model.safetensors, config.json, answers.npz}, arrays in_* and out_* in float32.
"""

# pyright: reportMissingImports=false
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
LM = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}
LM |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SEEN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "patch_size": 4}
SEEN |= {"num_attention_heads": 4, "image_size": 16}
READ = {**TEXT, "num_attention_heads": 4, "max_position_embeddings": 12}
CLIP = {"text_config": {**READ, "eos_token_id": 49}, "vision_config": SEEN, "projection_dim": 24}
PAIR = {"text_config": {**READ, "projection_size": 32}, "vision_config": SEEN}


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """No two parameters alike, and none at its initial constant."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise if parameter.ndim > 1 else 0.2 * noise)
    return model.eval()


def images(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def texts(count: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 49, (count, length), generator=torch.Generator().manual_seed(2))


def see(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits and last states of an image model."""
    image, answers = images(), {}
    out = model(image, output_hidden_states=True)
    answers["image"] = image
    if hasattr(out, "logits"):
        answers["logits"] = out.logits
    else:
        answers["states"] = out.last_hidden_state
    return answers


def see_larger(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The same, and states of larger images through a resized grid of positions."""
    large = images(1, 24)
    more = model(large, interpolate_pos_encoding=True) if _resizes(model) else model(large)
    return {**see(model), "large": large, "large_states": more.last_hidden_state}


def _resizes(model: torch.nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(model.embeddings.forward).parameters


def read(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits of texts, one padded in front."""
    ids = texts()
    valid = torch.ones_like(ids)
    valid[1, :3] = 0
    place = (valid.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=valid, position_ids=place).logits
    return {"ids": ids, "valid": valid, "logits": logits}


def encode(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """States and pooled features of texts, one padded behind."""
    ids, valid = texts(), torch.ones(2, 11, dtype=torch.long)
    valid[1, 8:] = 0
    out = model(ids, attention_mask=valid)
    return {
        "ids": ids,
        "valid": valid,
        "states": out.last_hidden_state,
        "pooled": out.pooler_output,
    }


def match(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Similarities of images and texts."""
    ids, image = texts(3, 12), images()
    ids[:, 9] = 49
    return {"ids": ids, "image": image, "logits": model(ids, image).logits_per_image}


def translate(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits of targets given sources."""
    ids, target = texts(), texts(2, 5)
    valid = torch.ones_like(ids)
    valid[1, 8:] = 0
    logits = model(ids, attention_mask=valid, decoder_input_ids=target).logits
    return {"ids": ids, "valid": valid, "target": target, "logits": logits}


def talk(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits of a prompt with an image."""
    image = images(1)
    ids = texts(1, 9)
    whole = torch.cat([ids[:, :3], torch.full((1, 16), 49), ids[:, 3:]], 1)
    return {"ids": ids, "image": image, "logits": model(input_ids=whole, pixel_values=image).logits}


def talk_of_crops(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits of a prompt with a wide image: an overview and two crops, of which borders go."""
    image, ids = images(3), texts(1, 9)
    size = torch.tensor([[13, 40]])
    count = 16 + 2 * (8 + 1)  # a row of each border goes, every row ends in a newline
    whole = torch.cat([ids[:, :3], torch.full((1, count), 49), ids[:, 3:]], 1)
    out = model(input_ids=whole, pixel_values=image[None], image_sizes=size)
    return {"ids": ids, "image": image, "logits": out.logits}


def t5() -> torch.nn.Module:
    config = tf.T5Config(
        d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=50,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8,
        relative_attention_max_distance=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = tf.T5ForConditionalGeneration(config)
    # As in the released files of v1.1: the logits alone have a table of their own.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def llava() -> torch.nn.Module:
    vision, text = tf.CLIPVisionConfig(**SEEN), tf.LlamaConfig(**LM)
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=49)
    return tf.LlavaForConditionalGeneration(config)


def llava_next() -> torch.nn.Module:
    text = tf.LlamaConfig(**{**LM, "max_position_embeddings": 80})
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**SEEN), text_config=text, image_token_index=49,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )  # fmt: skip
    return tf.LlavaNextForConditionalGeneration(config)


def scaled(kind: str) -> dict[str, Any]:
    """Parameters under which the first of 4 pairs is fast, the second between, the others slow."""
    table = {"rope_type": kind, "rope_theta": 20.0, "factor": 4.0}
    if kind == "linear":
        return table
    table |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {**table, "original_max_position_embeddings": 32}


Make = Callable[[], torch.nn.Module]
Ask = Callable[[torch.nn.Module], dict[str, torch.Tensor]]
DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}
DINO |= {"image_size": 16, "mlp_ratio": 2, "layerscale_value": 0.7}
FAR = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
FAMILIES: dict[str, tuple[Make, Ask]] = {
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**SEEN, num_labels=7)), see),
    "vit_model": (
        lambda: tf.ViTModel(tf.ViTConfig(**SEEN), add_pooling_layer=False), see_larger
    ),
    "deit": (
        lambda: tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**SEEN, num_labels=7)), see
    ),
    "dinov2": (lambda: tf.Dinov2Model(tf.Dinov2Config(**DINO)), see_larger),
    "dinov2_head": (
        lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**DINO, num_labels=7)), see
    ),
    "dinov2_registers": (
        lambda: tf.Dinov2WithRegistersModel(
            tf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)
        ),
        see_larger,
    ),
    "clip_vision": (lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**SEEN)), see),
    "clip": (lambda: tf.CLIPModel(tf.CLIPConfig(**CLIP)), match),
    "siglip": (lambda: tf.SiglipModel(tf.SiglipConfig(**PAIR)), match),
    "bert": (
        lambda: tf.BertModel(tf.BertConfig(**READ)), encode
    ),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LM)), read),
    "llama_linear": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LM, rope_parameters=scaled("linear"))), read
    ),
    "llama31": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LM, rope_parameters=scaled("llama3"))), read
    ),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LM, tie_word_embeddings=True)), read),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**LM, sliding_window=4)), read),
    "gemma": (
        lambda: tf.GemmaForCausalLM(
            tf.GemmaConfig(**LM, head_dim=8, hidden_activation="gelu_pytorch_tanh")
        ),
        read,
    ),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**LM, **FAR)), read),
    "gemma3": (
        lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(
                **{**LM, "num_hidden_layers": 6}, **FAR,
                layer_types=["sliding_attention"] * 5 + ["full_attention"],
            )
        ),
        read,
    ),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=40, vocab_size=50,
                          bos_token_id=0, eos_token_id=1)
        ),
        read,
    ),
    "t5": (t5, translate),
    "llava": (llava, talk),
    "llava_next": (llava_next, talk_of_crops),
}  # fmt: skip


def freeze(name: str, directory: Path) -> None:
    """One family's files."""
    torch.manual_seed(0)
    model = spread(FAMILIES[name][0]())
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    arrays: Any = _answers(name, model)
    np.savez_compressed(directory / "answers.npz", **arrays)


def answer(name: str, directory: Path) -> dict[str, np.ndarray]:
    """What a family's model answers that is read from files."""
    kind = type(FAMILIES[name][0]())
    return _answers(name, kind.from_pretrained(directory).eval())


def _answers(name: str, model: torch.nn.Module) -> dict[str, np.ndarray]:
    with torch.no_grad():
        answers = FAMILIES[name][1](model)
    inputs = ("image", "large", "ids", "valid", "target")
    return {("in_" if k in inputs else "out_") + k: v.numpy() for k, v in answers.items()}


if __name__ == "__main__":
    where, *wanted = sys.argv[1:]
    for each in wanted or FAMILIES:
        freeze(each, Path(where) / each)
        print(each)
