"""T5 v1.1 and ByT5, and MrT5 without its gate."""

from collections.abc import Mapping
from typing import Any

from tokred.interop.names import Rule, transpose
from tokred.models import EncoderDecoderConfig

LETTERS = {"q": "query", "k": "key", "v": "value", "o": "out"}
GATED = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
STACK = r"(encoder|decoder)\.block\.(\d+)\.layer"


def _attention(number: int, theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(rf"{STACK}\.{number}\.{theirs}\.{a}\.weight", rf"\1/blocks/\2/{ours}/{b}/kernel",
             transpose)
        for a, b in LETTERS.items()
    ]  # fmt: skip


T5: tuple[Rule, ...] = (
    Rule(r"shared\.weight", "embed/embedding"),
    Rule(r"(?:encoder|decoder)\.embed_tokens\.weight", None),  # the same once more
    Rule(r"lm_head\.weight", "head/kernel", transpose),
    Rule(r"(encoder|decoder)\.final_layer_norm\.weight", r"\1/norm/scale"),
    *_attention(0, "SelfAttention", "attn"),
    *_attention(1, "EncDecAttention", "cross"),
    Rule(
        rf"{STACK}\.0\.SelfAttention\.relative_attention_bias\.weight",
        r"\1/blocks/\2/relative/table",
    ),
    Rule(rf"{STACK}\.0\.layer_norm\.weight", r"\1/blocks/\2/norm1/scale"),
    Rule(r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight", r"encoder/blocks/\1/norm2/scale"),
    Rule(
        r"decoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight",
        r"decoder/blocks/\1/norm_cross/scale",
    ),
    Rule(r"decoder\.block\.(\d+)\.layer\.2\.layer_norm\.weight", r"decoder/blocks/\1/norm2/scale"),
    *(
        Rule(rf"{STACK}\.[12]\.DenseReluDense\.{a}\.weight", rf"\1/blocks/\2/mlp/{b}/kernel",
             transpose)
        for a, b in GATED.items()
    ),
)  # fmt: skip
FIELDS = {
    "vocab": "vocab_size",
    "width": "d_model",
    "depth": "num_layers",
    "decoder_depth": "num_decoder_layers",
    "heads": "num_heads",
    "head_dim": "d_kv",
    "hidden": "d_ff",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "norm_eps": "layer_norm_epsilon",
    "tie": "tie_word_embeddings",
}


def t5_config(settings: Mapping[str, Any], **changes: Any) -> EncoderDecoderConfig:
    """The config of a config.json; changes: fields of it, such as `context` or `sink`.

    Raises:
      ValueError: a model that is no T5 v1.1, whose MLP is not gated.
    """
    gate = settings.get("feed_forward_proj")
    if settings.get("model_type") not in ("t5", "mt5", "mrt5") or gate != "gated-gelu":
        raise ValueError(
            f"config.json: expected a T5 v1.1 with feed_forward_proj='gated-gelu', got model_type="
            f"{settings.get('model_type')!r} with {gate!r}; load a ByT5 or a T5 v1.1."
        )
    named = {ours: settings[theirs] for ours, theirs in FIELDS.items() if theirs in settings}
    sink = {"sink": bool(settings.get("use_softmax1", False))}
    return EncoderDecoderConfig(**{**sink, **named, **changes})
