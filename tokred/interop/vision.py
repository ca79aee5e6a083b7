"""ViT, DeiT, DINOv2 and the vision towers of CLIP and SigLIP."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tokred.interop.family import Family, Settings, activation, label_count, renamed, require
from tokred.interop.names import (
    AS_IS,
    CONV,
    INNER,
    OUTER,
    Change,
    Rule,
    first_prefix,
    linears,
    norms,
    split,
)
from tokred.models import ViT, ViTConfig
from tokred.nn.grids import grid_matrix, resize_matrix

SELF = {f"attention.attention.{n}": f"attn/{n}" for n in ("query", "key", "value")}
SELF["attention.output.dense"] = "attn/out"
TORCH = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
TOWER = {f"self_attn.{a}": f"attn/{b}" for a, b in TORCH.items()}
PERCEPTRON = {"mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
FIELDS = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "channels": "num_channels",
    "norm_eps": "layer_norm_eps",
    "qkv_bias": "qkv_bias",
}


def sides(settings: Settings, field: str) -> tuple[int, int]:
    """(rows, columns) of a field that is one number or two."""
    value = settings[field]
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def resized(settings: Settings, config: ViTConfig, antialias: bool = False) -> Change:
    """A table of positions brought to another grid as torch's bicubic `interpolate` does; rows in
    front of the grid stay. Writing leaves it at the grid that it has."""
    image, patch = sides(settings, "image_size"), sides(settings, "patch_size")
    stored = image[0] // patch[0], image[1] // patch[1]
    if config.grid == stored:
        return AS_IS
    pairs = zip(stored, config.grid, strict=True)
    matrix = grid_matrix(*(resize_matrix(a, b, "bicubic", antialias=antialias) for a, b in pairs))

    def read(table: np.ndarray) -> np.ndarray:
        front = len(table) - stored[0] * stored[1]
        grid = (matrix @ table[front:].astype(np.float32)).astype(table.dtype)
        return np.concatenate([table[:front], grid])

    return AS_IS._replace(read=read)


def then(first: Change, second: Change) -> Change:
    """Both, one after the other."""
    return Change(lambda a: second.read(first.read(a)), lambda a: first.write(second.write(a)))


def _shared(settings: Settings) -> dict[str, Any]:
    gelu = activation(settings).removeprefix("gelu_").replace("gelu", "exact")
    shape = {"image_size": sides(settings, "image_size"), "patch": sides(settings, "patch_size")}
    hidden = renamed(settings, {"hidden": "intermediate_size"})
    return {**renamed(settings, FIELDS), **shape, **hidden, "gelu": gelu, "classes": 0}


def _classes(settings: Settings, names: Iterable[str], head: str) -> int:
    return label_count(settings) if any(n.startswith(head) for n in names) else 0


def _vit_config(settings: Settings, names: Iterable[str]) -> ViTConfig:
    names = tuple(names)
    distill = any(n.endswith("distillation_token") for n in names)
    head = "cls_classifier" if distill else "classifier"
    return ViTConfig(**{
        **_shared(settings), "distill": distill, "classes": _classes(settings, names, head)
    })  # fmt: skip


def _embeddings(theirs: str, settings: Settings, config: ViTConfig, antialias: bool) -> list[Rule]:
    table = then(INNER, resized(settings, config, antialias))
    patch = f"{theirs}patch_embeddings.projection"
    return [
        Rule(f"{theirs}cls_token", "cls", INNER),
        Rule(f"{theirs}distillation_token", "distill", INNER),
        Rule(f"{theirs}register_tokens", "registers", INNER),
        Rule(f"{theirs}mask_token", None),  # of pretraining
        Rule(f"{theirs}position_embeddings", "position", table),
        Rule(f"{patch}.weight", "embed/proj/kernel", CONV),
        Rule(f"{patch}.bias", "embed/proj/bias"),
    ]


HEADS = {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_distill"}


def _vit_rules(settings: Settings, names: Iterable[str], config: ViTConfig) -> list[Rule]:
    at = first_prefix(names, "vit.", "deit.", "")
    layer, block = at + "encoder.layer.{i}.", "blocks/{i}/"
    feed = {"intermediate.dense": "mlp/fc1", "output.dense": "mlp/fc2"}
    around = {"layernorm_before": "norm1", "layernorm_after": "norm2"}
    return [
        *_embeddings(f"{at}embeddings.", settings, config, antialias=False),
        *linears(layer, block, SELF | feed),
        *norms(layer, block, around),
        *norms(at, "", {"layernorm": "norm"}),
        *linears("", "", HEADS),
    ]


def _dino_config(settings: Settings, names: Iterable[str]) -> ViTConfig:
    require(settings, use_swiglu_ffn=False, apply_layernorm=True)
    classes = _classes(settings, names, "classifier")
    return ViTConfig(**{
        **_shared(settings),
        "mlp_ratio": float(settings["mlp_ratio"]),
        "layer_scale": float(settings.get("layerscale_value", 1.0)),
        "registers": settings.get("num_register_tokens", 0),
        "pool": "class_mean" if classes else "class",
        "classes": classes,
    })  # fmt: skip


def _dino_rules(settings: Settings, names: Iterable[str], config: ViTConfig) -> list[Rule]:
    at = first_prefix(names, "dinov2.", "dinov2_with_registers.", "")
    layer, block = at + "encoder.layer.{i}.", "blocks/{i}/"
    scales = [
        Rule(f"{layer}layer_scale{n}.lambda1", f"{block}scale{n}") for n in (1, 2)
    ]  # fmt: skip
    return [
        *_embeddings(f"{at}embeddings.", settings, config, antialias=bool(config.registers)),
        *linears(layer, block, SELF | PERCEPTRON),
        *norms(layer, block, {"norm1": "norm1", "norm2": "norm2"}),
        *scales,
        *norms(at, "", {"layernorm": "norm"}),
        *linears("", "", HEADS),
    ]


def clip_vision_config(settings: Settings, classes: int = 0) -> ViTConfig:
    """classes: channels of a projection without bias."""
    return ViTConfig(**{
        **_shared(settings), "embed_norm": True, "norm_after_pool": True, "patch_bias": False,
        "classes": classes, "head_bias": False,
    })  # fmt: skip


def siglip_vision_config(settings: Settings) -> ViTConfig:
    """With the pooling head, which every released model has."""
    require(settings, vision_use_head=True)
    return ViTConfig(**{**_shared(settings), "class_token": False, "pool": "map"})


def tower_rules(theirs: str, ours: str, settings: Settings, config: ViTConfig) -> list[Rule]:
    """Of a vision tower of CLIP or SigLIP."""
    embed = f"{theirs}embeddings."
    layer, block = theirs + "encoder.layers.{i}.", ours + "blocks/{i}/"
    head, pool = f"{theirs}head.", f"{ours}pool/"
    qkv = tuple(f"{pool}attn/{n}" for n in ("query", "key", "value"))
    places = {"pre_layrnorm": "embed_norm", "post_layernorm": "norm"}
    return [
        Rule(f"{embed}class_embedding", f"{ours}cls", OUTER),
        Rule(f"{embed}patch_embedding.weight", f"{ours}embed/proj/kernel", CONV),
        Rule(f"{embed}patch_embedding.bias", f"{ours}embed/proj/bias"),
        Rule(f"{embed}position_embedding.weight", f"{ours}position", resized(settings, config)),
        Rule(f"{embed}position_ids", None),
        *linears(layer, block, TOWER | PERCEPTRON),
        *norms(layer, block, {"layer_norm1": "norm1", "layer_norm2": "norm2"}),
        *norms(theirs, ours, places),
        Rule(f"{head}probe", f"{pool}query", INNER),
        Rule(f"{head}attention.in_proj_weight", tuple(f"{p}/kernel" for p in qkv),
             split(3, 0, transpose=True)),
        Rule(f"{head}attention.in_proj_bias", tuple(f"{p}/bias" for p in qkv), split(3)),
        *linears(head, pool, {"attention.out_proj": "attn/out", **PERCEPTRON}),
        *norms(head, pool, {"layernorm": "norm"}),
    ]  # fmt: skip


def _tower(settings: Settings, names: Iterable[str], config: ViTConfig) -> list[Rule]:
    at = first_prefix(names, "vision_model.", "")
    return tower_rules(at, "", settings, config)


VIT = Family("vit", ("vit", "deit"), ViT, _vit_config, _vit_rules)
DINOV2 = Family("dinov2", ("dinov2", "dinov2_with_registers"), ViT, _dino_config, _dino_rules)
CLIP_VISION = Family(
    "clip_vision", ("clip_vision_model",), ViT, lambda s, _: clip_vision_config(s), _tower
)
SIGLIP_VISION = Family(
    "siglip_vision", ("siglip_vision_model",), ViT, lambda s, _: siglip_vision_config(s), _tower
)
