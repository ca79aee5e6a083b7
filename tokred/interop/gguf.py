"""Llamas as llama.cpp writes them: one GGUF file, often of few bits."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tokred.interop.families import Source
from tokred.interop.safetensors import ONE

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    **{
        "blk.{i}." + theirs: "model.layers.{i}." + ours
        for theirs, ours in {
            "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        }.items()
    },
}  # fmt: skip
SETTINGS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
KINDS = {"llama": "llama"}


@dataclass(frozen=True)
class GGUF(Source):
    """directory: of the file itself. Arrays are read in float32, whatever their bits were."""

    @cached_property
    def held(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """What the file says of itself, and its tensors under Hugging Face's names. Raises
        ImportError without gguf, ValueError for another kind of file."""
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ImportError(
                'GGUF files need the library gguf; run `pip install "tokred[gguf]"`.'
            ) from error
        try:
            reader = GGUFReader(self.directory)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{self.directory} is no GGUF file ({error}); copy it again."
            ) from None
        # The reader holds an array per word of the vocabulary: let go of it.
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, {_name(tensor.name): tensor for tensor in reader.tensors}

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self.held[1]

    def field(self, name: str) -> Any:
        """What the file says of itself; None where it is silent."""
        return self.held[0].get(name)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """As config.json would have them. Raises ValueError for another architecture."""
        kind = self.field("general.architecture")
        if kind not in KINDS:
            raise ValueError(
                f"{self.directory} holds a {kind!r}; only {list(KINDS)} is read from GGUF."
            )
        named = {ours: self.field(f"{kind}.{theirs}") for ours, theirs in SETTINGS.items()}
        table = self.tensors["model.embed_tokens.weight"]
        return {
            "model_type": KINDS[kind], "hidden_act": "silu", "vocab_size": int(table.shape[-1]),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            **{name: value for name, value in named.items() if value is not None},
        }  # fmt: skip

    @cached_property
    def files(self) -> Mapping[str, Any]:
        return dict.fromkeys(self.tensors, self.directory)

    @property
    def shards(self) -> dict[str, set[str]]:
        return {ONE: set(self.tensors)}

    def metadata(self, file: str) -> Mapping[str, str]:
        return {"format": "pt"}

    def tensor(self, name: str) -> np.ndarray:
        from gguf import dequantize

        tensor = self.tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
        if found := re.search(r"self_attn\.([qk])_proj", name):
            array = _halves(array, self.settings[heads[found[1]]])
        return array

    def tokenizer(self) -> Any:
        """A byte-level tokenizer of the library tokenizers. Raises ImportError without it,
        ValueError for another kind."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        kind = self.field("tokenizer.ggml.model"), self.field("tokenizer.ggml.pre")
        if kind != ("gpt2", "smollm"):
            raise ValueError(
                f"{self.directory}: a tokenizer of kind {kind} is not supported, only byte pairs "
                "of ('gpt2', 'smollm'); make one with the library tokenizers."
            )
        tokens = self.field("tokenizer.ggml.tokens")
        merges = [tuple(pair.split(" ")) for pair in self.field("tokenizer.ggml.merges")]
        vocab = {token: i for i, token in enumerate(tokens)}
        made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
        made.decoder = decoders.ByteLevel()
        control = (t for t, k in zip(tokens, self.field("tokenizer.ggml.token_type"), strict=True)
                   if k == 3)  # fmt: skip
        made.add_special_tokens([AddedToken(token, normalized=False) for token in control])
        return made


def _name(stored: str) -> str:
    template, numbers = stored, {}
    if found := re.match(r"blk\.(\d+)\.", stored):
        template, numbers = stored.replace(found[1], "{i}", 1), {"i": found[1]}
    head, _, tail = template.rpartition(".")
    return f"{NAMES[head].format(**numbers)}.{tail}" if head in NAMES else stored


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp turns neighbouring channels, everything here the two halves of a head."""
    shape = (heads, rows.shape[0] // heads // 2, 2, rows.shape[1])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def open_source(path: str | Path, family: str | None = None) -> Source:
    """What a directory, or a GGUF file, holds; family: see `Source`."""
    path = Path(path)
    return (GGUF if path.suffix == ".gguf" else Source)(path, family)
