"""The torch side of `benchmarks.cache_peers`: a transformers Llama and kvpress.

Runs in an environment of its own, with torch and kvpress and without tokred. Reads one JSON line
that says what to build, then names of programs, one a line; answers each with the seconds of one
call.
"""

# pyright: reportMissingImports=false
import contextlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import kvpress
import torch
import transformers as tf

from benchmarks.answer import answer, hear

PRESSES = {
    "streaming_llm": kvpress.StreamingLLMPress,
    "tova": kvpress.TOVAPress,
    "snapkv": kvpress.SnapKVPress,
    "pyramidkv": kvpress.PyramidKVPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
    "knorm": kvpress.KnormPress,
    "keydiff": kvpress.KeyDiffPress,
    "lagkv": kvpress.LagKVPress,
    "cur": kvpress.CURPress,
}


def build(spec: dict) -> tf.LlamaForCausalLM:
    """A Llama of these sizes with random weights; spec: fields of LlamaConfig."""
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**spec)).eval()


def read(model: tf.LlamaForCausalLM, ids: torch.Tensor, press: Any) -> tuple[Any, torch.Tensor]:
    """The smaller cache of a prompt, and the logits behind it."""
    cache = tf.DynamicCache()
    with contextlib.nullcontext() if press is None else press(model):
        out = model(ids, past_key_values=cache, logits_to_keep=1)
    return cache, out.logits


def write(
    model: tf.LlamaForCausalLM, cache: Any, first: torch.Tensor, place: int, steps: int
) -> torch.Tensor:
    """The likeliest tokens behind the cache, which is as before in the end; first: [B 1], at
    `place` of the sequence."""
    held = [layer.keys.shape[2] for layer in cache.layers]
    ids, found = first, []
    for step in range(steps):
        places = torch.full_like(ids, place + step)
        out = model(ids, past_key_values=cache, position_ids=places, logits_to_keep=1)
        ids = out.logits.argmax(-1)
        found.append(ids)
    for layer, count in zip(cache.layers, held, strict=True):
        layer.keys, layer.values = layer.keys[:, :, :count], layer.values[:, :, :count]
    return torch.cat(found, 1)


def size(cache: Any) -> int:
    """Bytes of keys and values."""
    return sum(a.numel() * a.element_size() for x in cache.layers for a in (x.keys, x.values))


def programs(spec: dict) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """By 'METHOD/prompt' and 'METHOD/token': reading the prompt, writing all tokens behind it; and
    the bytes of every method's cache."""
    model, tokens = build(spec["model"]), spec["tokens"]
    shape = (spec["batch"], tokens)
    ids = torch.randint(
        0, spec["model"]["vocab_size"], shape, generator=torch.Generator().manual_seed(1)
    )
    found: dict[str, Callable[[], Any]] = {}
    held: dict[str, int] = {}
    for name in spec["methods"]:
        kind = PRESSES.get(name)
        press = None if kind is None else kind(compression_ratio=1 - spec["keep"])
        cache, logits = read(model, ids, press)
        first, held[name] = logits.argmax(-1), size(cache)
        behind = lambda c=cache, f=first: write(model, c, f, tokens, spec["steps"])  # noqa: E731
        found[f"{name}/prompt"] = lambda p=press: read(model, ids, p)
        found[f"{name}/token"] = behind
    return found, held


def main() -> None:
    """The conversation on stdin and stdout."""
    spec = hear()
    torch.set_num_threads(spec["threads"])
    with torch.inference_mode():
        found, held = programs(spec)
        about = {package.__name__: package.__version__ for package in (torch, tf)}
        about |= {"kvpress": importlib.metadata.version("kvpress"), "bytes": held}
        answer(found, about)


if __name__ == "__main__":
    main()
