"""BERT, and CLIP and SigLIP with both towers."""

from collections.abc import Iterable

import numpy as np

from tokred.interop.family import Family, Settings, activation, renamed
from tokred.interop.names import AS_IS, TRANSPOSE, Change, Rule, first_prefix, linears, norms
from tokred.interop.vision import (
    PERCEPTRON,
    TOWER,
    clip_vision_config,
    siglip_vision_config,
    tower_rules,
)
from tokred.models import (
    DecoderConfig,
    DualEncoder,
    DualEncoderConfig,
    TextEncoder,
    TextEncoderConfig,
)

FIELDS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "context": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
}
PLAIN = {"rotary": False, "norm": "layer", "gated": False, "bias": True, "qkv_bias": True}
SCALAR = Change(lambda a: a.reshape(()), lambda a: np.reshape(a, (1,)))


def _trunk(settings: Settings, **more: object) -> DecoderConfig:
    named = renamed(settings, FIELDS)
    return DecoderConfig(**{**PLAIN, **named, "activation": activation(settings), **more})


def _bert_config(settings: Settings, names: Iterable[str]) -> TextEncoderConfig:
    trunk = _trunk(
        settings, causal=False, norm_first=False, embed_norm=True, final_norm=False,
        segments=settings.get("type_vocab_size", 2),
    )  # fmt: skip
    tanh = any("pooler." in name for name in names)
    return TextEncoderConfig(trunk, pool="first" if tanh else "mean", tanh=tanh)


BERT_LAYER = {f"attention.self.{n}": f"attn/{n}" for n in ("query", "key", "value")} | {
    "attention.output.dense": "attn/out", "intermediate.dense": "mlp/fc1",
    "output.dense": "mlp/fc2",
}  # fmt: skip


def _bert_rules(settings: Settings, names: Iterable[str], config: TextEncoderConfig) -> list[Rule]:
    at = first_prefix(names, "bert.", "")
    embed, layer, block = f"{at}embeddings.", at + "encoder.layer.{i}.", "trunk/blocks/{i}/"
    tables = {
        "word_embeddings": "embed", "position_embeddings": "places",
        "token_type_embeddings": "segments",
    }  # fmt: skip
    closing = {"attention.output.LayerNorm": "close1", "output.LayerNorm": "close2"}
    unused = [Rule(f"{at}pooler.dense.{kind}", None) for kind in ("weight", "bias")]
    return [
        *([] if config.tanh else unused),
        *(Rule(f"{embed}{a}.weight", f"trunk/{b}/embedding") for a, b in tables.items()),
        Rule(f"{embed}position_ids", None),
        *norms(embed, "trunk/", {"LayerNorm": "embed_norm"}),
        *linears(layer, block, BERT_LAYER),
        *norms(layer, block, closing),
        *linears(at, "", {"pooler.dense": "pooler"}),
    ]


def _reader_rules(theirs: str, ours: str) -> list[Rule]:
    """Of a text tower of CLIP or SigLIP."""
    embed, trunk = f"{theirs}embeddings.", f"{ours}trunk/"
    layer, block = theirs + "encoder.layers.{i}.", trunk + "blocks/{i}/"
    return [
        Rule(f"{embed}token_embedding.weight", f"{trunk}embed/embedding"),
        Rule(f"{embed}position_embedding.weight", f"{trunk}places/embedding"),
        Rule(f"{embed}position_ids", None),
        *linears(layer, block, TOWER | PERCEPTRON),
        *norms(layer, block, {"layer_norm1": "norm1", "layer_norm2": "norm2"}),
        *norms(theirs, trunk, {"final_layer_norm": "norm"}),
        *linears(theirs, ours, {"head": "head"}),
    ]


def _clip_config(settings: Settings, names: Iterable[str]) -> DualEncoderConfig:
    text, width = settings["text_config"], settings["projection_dim"]
    # Files from before 2023 say 2 and mean the largest id.
    end = None if text.get("eos_token_id", 2) == 2 else text["eos_token_id"]
    how = {"pool": "end", "end_id": end, "classes": width, "head_bias": False}
    reader = TextEncoderConfig(_trunk(text, causal=True), **how)
    return DualEncoderConfig(clip_vision_config(settings["vision_config"], width), reader)


def _siglip_config(settings: Settings, names: Iterable[str]) -> DualEncoderConfig:
    text = settings["text_config"]
    width = text.get("projection_size") or text["hidden_size"]
    reader = TextEncoderConfig(_trunk(text, causal=False), pool="last", classes=width)
    vision = siglip_vision_config(settings["vision_config"])
    return DualEncoderConfig(vision, reader, shift=True)


def _pair_rules(settings: Settings, names: Iterable[str], config: DualEncoderConfig) -> list[Rule]:
    vector = settings["model_type"] == "siglip"
    number = SCALAR if vector else AS_IS
    return [
        *tower_rules("vision_model.", "vision/", settings["vision_config"], config.vision),
        *_reader_rules("text_model.", "text/"),
        Rule("visual_projection.weight", "vision/head/kernel", TRANSPOSE),
        Rule("text_projection.weight", "text/head/kernel", TRANSPOSE),
        Rule("logit_scale", "scale", number),
        Rule("logit_bias", "shift", number),
    ]


BERT = Family("bert", ("bert",), TextEncoder, _bert_config, _bert_rules)
CLIP = Family("clip", ("clip",), DualEncoder, _clip_config, _pair_rules)
SIGLIP = Family("siglip", ("siglip",), DualEncoder, _siglip_config, _pair_rules)
