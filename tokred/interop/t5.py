"""T5 v1.1 and ByT5, and MrT5 without its gate."""

from collections.abc import Iterable, Mapping
from typing import Any

from tokred.interop.family import Family, Settings, renamed, require
from tokred.interop.names import TRANSPOSE, Rule, linears, norms
from tokred.models import EncoderDecoder, EncoderDecoderConfig

LETTERS = {"q": "query", "k": "key", "v": "value", "o": "out"}
GATED = {"wi_0": "gate", "wi_1": "up", "wo": "down"}


def _stack(stack: str, feed: int) -> list[Rule]:
    """feed: which of a block's layers is the MLP."""
    block, ours = stack + ".block.{i}.layer.", stack + "/blocks/{i}/"
    own = {f"0.SelfAttention.{a}": f"attn/{b}" for a, b in LETTERS.items()}
    cross = {f"1.EncDecAttention.{a}": f"cross/{b}" for a, b in LETTERS.items()}
    mlp = {f"{feed}.DenseReluDense.{a}": f"mlp/{b}" for a, b in GATED.items()}
    between = {"1.layer_norm": "norm_cross"} if feed == 2 else {}
    table = "0.SelfAttention.relative_attention_bias.weight"
    return [
        Rule(f"{stack}.embed_tokens.weight", None),  # the same once more
        *linears(block, ours, own | mlp | (cross if feed == 2 else {})),
        *norms(block, ours, {"0.layer_norm": "norm1", f"{feed}.layer_norm": "norm2"} | between),
        Rule(block + table, ours + "relative/table"),
        *norms(stack, stack, {".final_layer_norm": "/norm"}),
    ]


RULES: list[Rule] = [
    Rule("shared.weight", "embed/embedding"),
    Rule("lm_head.weight", "head/kernel", TRANSPOSE),
    *_stack("encoder", 1),
    *_stack("decoder", 2),
]
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
    named = renamed(settings, FIELDS)
    sink = {"sink": bool(settings.get("use_softmax1", False))}
    return EncoderDecoderConfig(**{**sink, **named, **changes})


def _config(settings: Settings, names: Iterable[str]) -> EncoderDecoderConfig:
    """Files tell better than fields whether the logits have a table of their own: transformers 5
    says tie_word_embeddings of both kinds."""
    tie = "lm_head.weight" not in names
    require(settings, scale_decoder_outputs=tie)
    return t5_config(settings, tie=tie)


def _rules(settings: Settings, names: Iterable[str], config: EncoderDecoderConfig) -> list[Rule]:
    return RULES


T5 = Family("t5", ("t5", "mt5", "mrt5"), EncoderDecoder, _config, _rules)
