"""The tiny models of the table, and what checks need to know of each: configs, inputs, a run."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tests.methods_table import Extra
from tokred.models import (
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    ViT,
    ViTConfig,
)
from tokred.plan import Plan
from tokred.report import Call, Report

BATCH = 8
Config = ViTConfig | DecoderConfig | EncoderDecoderConfig
Result = tuple[Array, Report]
PATCHES: dict[str, Any] = {"patch": (4, 4), "width": 16, "depth": 4, "heads": 2, "classes": 5}
WORDS: dict[str, Any] = {
    "vocab": 13, "width": 16, "depth": 4, "heads": 4, "kv_heads": 2, "hidden": 24,
}  # fmt: skip


PAIR: dict[str, Any] = {
    "vocab": 13, "width": 16, "depth": 4, "decoder_depth": 1, "heads": 2, "head_dim": 8,
    "hidden": 24, "buckets": 8, "max_distance": 16, "target_context": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Vision:
    """Images [B H W C]."""

    odd: ViTConfig
    even: ViTConfig

    def make(self, config: ViTConfig, plan: Plan, rngs: Any) -> ViT:
        return ViT(config, plan=plan, rngs=rngs)

    def inputs(self, config: ViTConfig, seed: int) -> Array:
        shape = (BATCH, *config.image_size, config.channels)
        return jax.random.normal(jax.random.key(seed), shape)

    def nudge(self, config: ViTConfig) -> Array:
        """Zeros that are added to the input, to ask for its gradient."""
        return jnp.zeros((BATCH, *config.image_size, config.channels))

    def kernels(self, config: ViTConfig) -> int:
        return 6 * config.depth + 2

    def run(
        self, model: ViT, x: Array, valid: Any, plan: Plan, call: Call, extra: Any, nudge: Any
    ) -> Result:
        x = x if nudge is None else x + nudge
        return model(x, plan=plan, call=call, valid=valid)


@dataclass(frozen=True)
class Language:
    """ids [B N], with whatever the method reads per token."""

    odd: DecoderConfig
    even: DecoderConfig

    def make(self, config: DecoderConfig, plan: Plan, rngs: Any) -> Decoder:
        return Decoder(config, plan=plan, rngs=rngs)

    def inputs(self, config: DecoderConfig, seed: int) -> Array:
        return jax.random.randint(jax.random.key(seed), (BATCH, config.context), 0, config.vocab)

    def nudge(self, config: DecoderConfig) -> Array:
        """As of images, but added to the embedded tokens."""
        return jnp.zeros((BATCH, config.context, config.width))

    def kernels(self, config: DecoderConfig) -> int:
        return (5 if config.experts else 7) * config.depth + (not config.tie)

    def run(
        self, model: Decoder, x: Array, valid: Any, plan: Plan, call: Call, extra: Any, nudge: Any
    ) -> Result:
        more = extra_at(extra, places(x, valid))
        if nudge is None:
            return model(x, plan=plan, call=call, valid=valid, extra=more)
        tokens = model.tokens(x, valid, places(x, valid), extra=more)
        tokens = tokens.replace(x=tokens.x + nudge)
        tokens, report, _ = model.decode(tokens, plan=plan, call=call)
        return model.logits(tokens), report


@dataclass(frozen=True)
class Pairs:
    """ids [B N] of a source; the target is the same for all."""

    odd: EncoderDecoderConfig
    even: EncoderDecoderConfig

    def make(self, config: EncoderDecoderConfig, plan: Plan, rngs: Any) -> EncoderDecoder:
        return EncoderDecoder(config, plan=plan, rngs=rngs)

    def inputs(self, config: EncoderDecoderConfig, seed: int) -> Array:
        return jax.random.randint(jax.random.key(seed), (BATCH, config.context), 0, config.vocab)

    def nudge(self, config: EncoderDecoderConfig) -> Array:
        """As of images, but added to the embedded source."""
        return jnp.zeros((BATCH, config.context, config.width))

    def kernels(self, config: EncoderDecoderConfig) -> int:
        return 7 * config.depth + 11 * config.decoder_depth + (not config.tie)

    def run(
        self, model: EncoderDecoder, x: Array, valid: Any, plan: Plan, call: Call, extra: Any,
        nudge: Any,
    ) -> Result:  # fmt: skip
        target = jnp.broadcast_to(jnp.arange(model.config.target_context), (len(x), 4))
        tokens = model.tokens(x, valid)
        tokens = tokens if nudge is None else tokens.replace(x=tokens.x + nudge)
        memory, report = model.encode_tokens(tokens, plan=plan, call=call)
        return model.decode(target, memory, call=call), report


def _language(**more: Any) -> Language:
    """`even` has windows and a head of its own."""
    even = DecoderConfig(context=16, window=6, global_every=2, tie=False, **WORDS, **more)
    return Language(DecoderConfig(context=15, **WORDS, **more), even)


MODELS: dict[str, Any] = {
    # 3 x 5 patches and a class token; 4 x 4 patches and two registers more.
    "vit": Vision(
        ViTConfig(image_size=(12, 20), **PATCHES),
        ViTConfig(image_size=(16, 16), registers=2, **PATCHES),
    ),
    # The same with the mean of the patches for a class token's view.
    "vit_mean": Vision(
        ViTConfig(image_size=(12, 20), pool="mean", **PATCHES),
        ViTConfig(image_size=(16, 16), pool="mean", registers=2, **PATCHES),
    ),
    "vit_grid": Vision(
        ViTConfig(image_size=(16, 24), pool="mean", **PATCHES),
        ViTConfig(image_size=(16, 16), pool="mean", registers=2, **PATCHES),
    ),
    "vit_square": Vision(
        ViTConfig(image_size=(12, 12), pool="mean", **PATCHES),
        ViTConfig(image_size=(16, 16), pool="mean", registers=2, **PATCHES),
    ),
    "decoder": _language(),
    "cache": _language(),
    "experts": _language(experts=3),
    "pairs": Pairs(
        EncoderDecoderConfig(context=15, **PAIR),
        EncoderDecoderConfig(context=16, sink=True, **PAIR),
    ),
}


def kind_of(config: Config) -> Any:
    if isinstance(config, EncoderDecoderConfig):
        return MODELS["pairs"]
    return MODELS["vit" if isinstance(config, ViTConfig) else "decoder"]


def prompts() -> Array:
    """Lengths of the prompts, 4 to 7 tokens."""
    return 4 + jnp.arange(BATCH) % 4


def places(ids: Array, valid: Array | None, start: Any = 0) -> Array:
    """The place of each token in its sequence, counted over the valid ones."""
    ones = jnp.ones(ids.shape, jnp.int32) if valid is None else valid.astype(jnp.int32)
    return jnp.cumsum(ones, axis=-1) - 1 + jnp.reshape(start, (-1, 1))


def extra_at(extra: Extra | None, place: Array) -> dict[str, Array]:
    """The per-token arrays of a row, for tokens at these places of their sequences."""
    return {} if extra is None else dict(extra(place, prompts()[:, None]))
