"""Sizes by name: fields of the models' configs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from tokred.plan import nearest

Config = TypeVar("Config")


def make_config(
    kind: type[Config],
    sizes: Mapping[str, Mapping[str, Any]],
    name: str,
    changes: Mapping[str, Any],
) -> Config:
    """The config of a size. Raises ValueError for an unknown size or field, with the nearest."""
    if name not in sizes:
        raise ValueError(
            f"model {name!r} is unknown; sizes are {sorted(sizes)}{nearest(name, sizes)}"
        )
    fields = {f.name for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for field in changes:
        if field not in fields:
            raise ValueError(f"{kind.__name__} has no field {field!r}{nearest(field, fields)}")
    return kind(**{**sizes[name], **changes})


def _lm(width: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"width": width, "depth": depth, "heads": heads, **more}


_LLAMA3 = {"kv_heads": 8, "rope_theta": 500_000.0, "norm_eps": 1e-5, "vocab": 128_256}
_QWEN2 = {"qkv_bias": True, "rope_theta": 1e6, "vocab": 151_936, "context": 32_768}
_GEMMA = {
    "activation": "gelu_tanh",
    "norm_offset": 1.0,
    "scale_embed": True,
    "vocab": 256_000,
    "context": 8192,
    "head_dim": 256,
}

# lm_*: our own, named by their parameters without embeddings.
DECODERS: dict[str, dict[str, Any]] = {
    "lm_3m": _lm(192, 6, 3),
    "lm_10m": _lm(320, 8, 5),
    "lm_30m": _lm(512, 10, 8),
    "lm_100m": _lm(768, 14, 12),
    "lm_300m": _lm(1024, 24, 16),
    "lm_1b": _lm(2048, 20, 16, kv_heads=8, vocab=32_000),
    "lm_3b": _lm(3072, 28, 24, kv_heads=8, vocab=32_000),
    "lm_8b": _lm(4096, 36, 32, kv_heads=8, hidden=14_336, vocab=32_000, tie=False),
    "smollm2_135m": _lm(
        576, 30, 9, kv_heads=3, hidden=1536, vocab=49_152, context=8192, rope_theta=100_000.0,
        norm_eps=1e-5,
    ),
    "llama2_7b": _lm(
        4096, 32, 32, hidden=11_008, vocab=32_000, context=4096, norm_eps=1e-5, tie=False
    ),
    "llama3_8b": _lm(4096, 32, 32, hidden=14_336, context=8192, tie=False, **_LLAMA3),
    "mistral_7b": _lm(
        4096, 32, 32, kv_heads=8, hidden=14_336, vocab=32_000, context=32_768, window=4096,
        norm_eps=1e-5, tie=False,
    ),
    "mixtral_8x7b": _lm(
        4096, 32, 32, kv_heads=8, hidden=14_336, vocab=32_000, context=32_768, rope_theta=1e6,
        norm_eps=1e-5, tie=False, experts=8,
    ),
    "qwen2_0.5b": _lm(896, 24, 14, kv_heads=2, hidden=4864, **_QWEN2),
    "qwen2_7b": _lm(
        3584, 28, 28, kv_heads=4, hidden=18_944, tie=False, **{**_QWEN2, "vocab": 152_064}
    ),
    "gemma_2b": _lm(2048, 18, 8, kv_heads=1, hidden=16_384, **_GEMMA),
    "gemma2_2b": _lm(
        2304, 26, 8, kv_heads=4, hidden=9216, post_norm=True, window=4096, global_every=2,
        logit_cap=30.0, attention_cap=50.0, **_GEMMA,
    ),
}  # fmt: skip


def _t5(width: int, depth: int, decoder_depth: int, heads: int, hidden: int) -> dict[str, Any]:
    return {
        "width": width, "depth": depth, "decoder_depth": decoder_depth, "heads": heads,
        "hidden": hidden,
    }  # fmt: skip


# tiny and mini are our own, the others ByT5's.
BYTE_T5: dict[str, dict[str, Any]] = {
    "byt5_tiny": _t5(128, 4, 2, 2, 320),
    "byt5_mini": _t5(384, 6, 2, 6, 1024),
    "byt5_small": _t5(1472, 12, 4, 6, 3584),
    "byt5_base": _t5(1536, 18, 6, 12, 3968),
    "byt5_large": _t5(1536, 36, 12, 16, 3840),
    "byt5_xl": _t5(2560, 36, 12, 32, 6720),
    "byt5_xxl": _t5(4672, 36, 12, 64, 12_352),
}
