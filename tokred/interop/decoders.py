"""Llama, Mistral, Qwen2, Gemma 1 to 3 and GPT-2."""

from collections.abc import Iterable
from typing import Any

from tokred.interop.family import Family, Settings, activation, renamed, require
from tokred.interop.names import TRANSPOSE, Rule, first_prefix, linears, norms, split
from tokred.models import Decoder, DecoderConfig
from tokred.rotary import RopeScaling

FIELDS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden": "intermediate_size",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie": "tie_word_embeddings",
}
LAYER = {
    **{f"self_attn.{a}_proj": f"attn/{b}" for a, b in
       (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))},
    **{f"mlp.{name}_proj": f"mlp/{name}" for name in ("gate", "up", "down")},
}  # fmt: skip
HEAD_NORMS = {"self_attn.q_norm": "attn/query_norm", "self_attn.k_norm": "attn/key_norm"}
NORMS = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
AROUND = {
    "input_layernorm": "norm1", "post_attention_layernorm": "post1",
    "pre_feedforward_layernorm": "norm2", "post_feedforward_layernorm": "post2",
}  # fmt: skip


def rope(settings: Settings, default: float = 10_000.0) -> dict[str, Any]:
    """Bases of the rotation, of all layers or of far and near ones, and its scaling. Raises
    ValueError for scalings that are not supported."""
    table = settings.get("rope_parameters") or {}
    near, far = table.get("sliding_attention"), table.get("full_attention", table)
    older = settings.get("rope_scaling") or {}  # of files before transformers 5
    far = {**far, **{"rope_type" if k == "type" else k: v for k, v in older.items()}}
    kind = {"model_type": settings["model_type"]}
    require({**(near or {}), **kind}, rope_type="default")
    theta = far.get("rope_theta", settings.get("rope_theta", default))
    local = settings.get("rope_local_base_freq") if near is None else near["rope_theta"]
    fields = {"rope_theta": float(theta), "rope_scaling": _scaling({**far, **kind})}
    return fields | ({} if local is None else {"local_theta": float(local)})


def _scaling(table: Settings) -> RopeScaling | None:
    name = table.get("rope_type")
    require(table, rope_type=("default", "linear", "llama3"))
    if name in (None, "default"):
        return None
    named = {"factor": "factor"}
    if name == "llama3":
        named |= {"original": "original_max_position_embeddings"}
        named |= {"low": "low_freq_factor", "high": "high_freq_factor"}
    return RopeScaling(**renamed(table, named))


def _window(settings: Settings) -> dict[str, Any]:
    """How far back layers see. Raises ValueError unless the far ones come at equal distances."""
    if settings.get("sliding_window") is None or settings.get("use_sliding_window") is False:
        return {}
    kinds = settings.get("layer_types") or ["sliding_attention"] * settings["num_hidden_layers"]
    far = [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"]
    every = far[0] if far else 0
    if far != ([] if not every else list(range(every, len(kinds) + 1, every))):
        raise ValueError(
            f"config.json: layer_types={kinds} are not supported, only a full layer after every so "
            "many with a window; load another model."
        )
    return {"window": settings["sliding_window"], "global_every": every}


def llama_config(settings: Settings, names: Iterable[str] = ()) -> DecoderConfig:
    """Of Llama, Mistral and Qwen2."""
    require(settings, attention_bias=False, mlp_bias=False, pretraining_tp=1)
    named = {"tie": False, **renamed(settings, FIELDS)}
    window = {} if settings["model_type"] == "llama" else _window(settings)
    bias = settings["model_type"] == "qwen2"
    return DecoderConfig(**{
        **named, **rope(settings), **window, "activation": activation(settings), "qkv_bias": bias
    })  # fmt: skip


def _gemma_config(settings: Settings, names: Iterable[str]) -> DecoderConfig:
    kind = settings["model_type"]
    require(settings, query_pre_attn_scalar=settings.get("head_dim"))
    require(settings, attention_bias=False, use_bidirectional_attention=False)
    field = "hidden_activation" if settings.get("hidden_activation") else "hidden_act"
    caps = {"logit_cap": "final_logit_softcapping", "attention_cap": "attn_logit_softcapping"}
    return DecoderConfig(**{
        "tie": True, **renamed(settings, FIELDS | caps), **rope(settings),
        **({} if kind == "gemma" else _window(settings)),
        # Gemma's first files say 'gelu' and mean its tanh form.
        "activation": activation(settings, field).replace("gelu_tanh", "gelu") + "_tanh",
        "norm_offset": 1.0, "scale_embed": True, "post_norm": kind != "gemma",
        "qk_norm": kind == "gemma3_text",
    })  # fmt: skip


def llama_rules(theirs: str, ours: str, around: dict[str, str] = NORMS) -> list[Rule]:
    """theirs: what stands before 'model.'."""
    at, layer, block = f"{theirs}model.", theirs + "model.layers.{i}.", ours + "blocks/{i}/"
    return [
        Rule(f"{at}embed_tokens.weight", f"{ours}embed/embedding"),
        Rule(f"{theirs}lm_head.weight", f"{ours}head/kernel", TRANSPOSE),
        Rule(layer + "self_attn.rotary_emb.inv_freq", None),
        *linears(layer, block, LAYER),
        *norms(layer, block, around | HEAD_NORMS),
        *norms(at, ours, {"norm": "norm"}),
    ]


def _rules(settings: Settings, names: Iterable[str], config: DecoderConfig) -> list[Rule]:
    around = AROUND if config.post_norm else NORMS
    rules = llama_rules("", "", around)
    if config.tie:  # some files hold the table twice
        rules.insert(0, Rule("lm_head.weight", None))
    return rules


def _gpt2_config(settings: Settings, names: Iterable[str]) -> DecoderConfig:
    require(
        settings, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True,
        add_cross_attention=False, tie_word_embeddings=True,
    )  # fmt: skip
    width = settings["n_embd"]
    return DecoderConfig(
        vocab=settings["vocab_size"],
        width=width,
        depth=settings["n_layer"],
        heads=settings["n_head"],
        hidden=settings.get("n_inner") or 4 * width,
        context=settings["n_positions"],
        activation=activation(settings, "activation_function"),
        norm_eps=settings["layer_norm_epsilon"],
        rotary=False,
        norm="layer",
        gated=False,
        bias=True,
        qkv_bias=True,
    )


def _gpt2_rules(settings: Settings, names: Iterable[str], config: DecoderConfig) -> list[Rule]:
    at = first_prefix(names, "transformer.", "")
    layer, block = at + "h.{i}.", "blocks/{i}/"
    qkv = tuple(block + f"attn/{n}" for n in ("query", "key", "value"))
    plain = {"attn.c_proj": "attn/out", "mlp.c_fc": "mlp/fc1", "mlp.c_proj": "mlp/fc2"}
    return [
        Rule(f"{at}wte.weight", "embed/embedding"),
        Rule(f"{at}wpe.weight", "places/embedding"),
        Rule("lm_head.weight", None),
        Rule(f"{layer}attn.bias", None),  # masks
        Rule(f"{layer}attn.masked_bias", None),
        Rule(f"{layer}attn.c_attn.weight", tuple(f"{p}/kernel" for p in qkv), split(3)),
        Rule(f"{layer}attn.c_attn.bias", tuple(f"{p}/bias" for p in qkv), split(3)),
        # Conv1D holds (in, out).
        *(Rule(f"{layer}{a}.weight", f"{block}{b}/kernel") for a, b in plain.items()),
        *(Rule(f"{layer}{a}.bias", f"{block}{b}/bias") for a, b in plain.items()),
        *norms(layer, block, {"ln_1": "norm1", "ln_2": "norm2"}),
        *norms(at, "", {"ln_f": "norm"}),
    ]


LLAMA = Family("llama", ("llama", "mistral", "qwen2"), Decoder, llama_config, _rules)
GEMMA = Family("gemma", ("gemma", "gemma2", "gemma3_text"), Decoder, _gemma_config, _rules)
GPT2 = Family("gpt2", ("gpt2",), Decoder, _gpt2_config, _gpt2_rules)
