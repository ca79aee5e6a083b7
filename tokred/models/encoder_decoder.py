"""Encoder-decoders of T5 v1.1's architecture (ByT5): a plan acts in the encoder, and what it holds
for the part 'decoder', there.

What is left of the encoder's tokens, with their gates, is what the decoder looks at.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokred.cache import KVCache, Memory, make_cache
from tokred.models.decoder import slots_of
from tokred.models.encoder_decoder_config import EncoderDecoderConfig
from tokred.models.ids import check_ids, count_positions, head_at
from tokred.nn.layers import Layers, LayersRan
from tokred.nn.t5_block import RelativeBias, T5Block, T5Shape, t5_norm
from tokred.plan import Layout, Plan
from tokred.report import Call, Report, join_reports, make_report, reduce_model
from tokred.tokens import Tokens

DENSE = Plan()
START = 0  # the id that a target begins with


class Stack(nnx.Module):
    """Blocks that share one relative bias, and a norm at the end. reductions: what a plan learns
    there."""

    def __init__(self, shape: T5Shape, depth: int, *, scan: bool, rngs: nnx.Rngs):
        self.scan, self.reductions = scan, nnx.Dict()
        relative = RelativeBias(shape, rngs=rngs)
        self.blocks = nnx.List(T5Block(shape, relative, rngs=rngs) for _ in range(depth))
        self.norm = t5_norm(shape)

    def __call__(
        self,
        tokens: Tokens,
        plan: Plan,
        call: Call,
        layout: Layout,
        memories: Sequence[Memory] = (),
        **caching: Any,
    ) -> LayersRan:
        """All blocks and the norm; caching: see `Layers`."""
        ran = self.run(tokens, plan, call, layout, memories, **caching)
        return ran._replace(tokens=ran.tokens.replace(x=self.norm(ran.tokens.x)))

    def run(
        self,
        tokens: Tokens,
        plan: Plan,
        call: Call,
        layout: Layout,
        memories: Sequence[Memory] = (),
        **how: Any,
    ) -> LayersRan:
        """The blocks, all or some; how: see `Layers`."""
        layers = Layers(self.blocks, memories=memories, scan=self.scan)
        return layers(tokens, plan, call, plan.counts(layout), **how)


class EncoderDecoder(nnx.Module):
    """source [B N], target [B M] -> (logits [B M vocab], Report), under any Plan.

    plan: only its learned reductions matter here; their modules become `reductions`, those of the
    part 'decoder' `decoder.reductions`.
    """

    def __init__(self, config: EncoderDecoderConfig, *, plan: Plan = DENSE, rngs: nnx.Rngs):
        self.config = config
        c, kinds = config, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.embed = nnx.Embed(
            c.vocab, c.width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs, **kinds
        )
        self.encoder = Stack(c.shape("encoder"), c.depth, scan=c.scan, rngs=rngs)
        self.decoder = Stack(c.shape("decoder"), c.decoder_depth, scan=c.scan, rngs=rngs)
        init = nnx.initializers.normal(c.width**-0.5)
        self.head = None if c.tie else nnx.Linear(
            c.width, c.vocab, use_bias=False, kernel_init=init, rngs=rngs, **kinds
        )  # fmt: skip
        self.reductions = nnx.Dict(plan.of("").build(c.layout, rngs))
        layout = self._decoder_layout(c.target_context)
        self.decoder.reductions = nnx.Dict(plan.of("decoder").build(layout, rngs))

    def __call__(
        self,
        ids: Int[Array, "B N"],
        target: Int[Array, "B M"],
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        valid: Bool[Array, "B N"] | None = None,
        extra: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B M vocab"], Report]:
        """target: what the decoder has read, beginning with `START`; logits are of what follows.
        valid: which source tokens are real (None: all), padding on either side. extra: per-token
        arrays [B N ...] of the source that reductions read by name. Static: plan. The report is the
        encoder's, with what happened in the decoder as 'decoder/site'.

        Raises:
          ValueError: a sequence longer than its context, or a plan that does not fit.
          TypeError: ids that are no integers.
        """
        memory, read = self.encode(ids, plan=plan, call=call, valid=valid, extra=extra)
        call = (call or Call()).of("decoder")
        logits, written = self._decode(target, memory, plan.of("decoder"), call)
        return logits, join_reports({"": read, "decoder": written}, last="")

    def encode(
        self,
        ids: Int[Array, "B N"],
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        valid: Bool[Array, "B N"] | None = None,
        extra: dict[str, Array] | None = None,
    ) -> tuple[Tokens, Report]:
        """What the decoder looks at, [B K D] with its validity and gates; the rest as in a call."""
        check_ids(ids, self.config, plan)
        return self.encode_tokens(self.tokens(ids, valid, extra), plan=plan, call=call)

    def encode_tokens(
        self, tokens: Tokens, *, plan: Plan = DENSE, call: Call | None = None
    ) -> tuple[Tokens, Report]:
        """All layers of the encoder, from embedded tokens."""
        plan = plan.of("")
        call, layout = call or Call(), self.config.layout_of(tokens.n)
        call = dataclasses.replace(call, modules={**self.reductions, **call.modules})
        tokens, first = reduce_model(plan, "input", tokens, call)
        ran = self.encoder(tokens, plan, call, layout)
        tokens, last = reduce_model(plan, "output", ran.tokens, call)
        records = first + ran.records + last
        return tokens, make_report(tokens, records, ran.sources, plan.counts(layout))

    def tokens(
        self, ids: Int[Array, "B N"], valid: Any = None, extra: dict[str, Array] | None = None
    ) -> Tokens:
        """Embedded tokens. Only distances between positions matter, so a slot is a position."""
        x = self.embed(ids)
        if valid is not None:
            x = jnp.where(valid[..., None], x, jnp.zeros_like(x))
        place = jnp.arange(ids.shape[1], dtype=jnp.float32)[None, :, None]
        return Tokens(x, valid=valid, position=place, extra=extra or {})

    def decode(
        self,
        target: Int[Array, "B M"],
        memory: Tokens,
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
    ) -> Float[Array, "B M vocab"]:
        """Logits of what follows each target token, in float32. plan: of the decoder alone."""
        return self._decode(target, memory, plan, call or Call())[0]

    def _decode(
        self, target: Array, memory: Tokens, plan: Plan, call: Call
    ) -> tuple[Array, Report]:
        check_ids(target, self._decoding, plan)
        tokens, memories = self.tokens(target), (Memory(memory),) * self.config.decoder_depth
        ran, report = self._write(tokens, plan, call, memories)
        return self.logits(ran.tokens), report

    def _write(
        self, tokens: Tokens, plan: Plan, call: Call, memories: Sequence[Memory], **caching: Any
    ) -> tuple[LayersRan, Report]:
        """All layers of the decoder, under a plan of the decoder alone."""
        layout = self._decoder_layout(tokens.n)
        call = dataclasses.replace(call, modules={**self.decoder.reductions, **call.modules})
        ran = self.decoder(tokens, plan, call, layout, memories, **caching)
        return ran, make_report(ran.tokens, ran.records, ran.sources, plan.counts(layout))

    def extend(
        self,
        target: Int[Array, "B M"],
        cache: KVCache,
        memories: Sequence[Memory],
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        valid: Bool[Array, "B M"] | None = None,
        fresh: bool = False,
        last: bool = False,
    ) -> tuple[Float[Array, "B K vocab"], KVCache, Report]:
        """M more target tokens: they follow those that `cache` has seen. plan: of the decoder
        alone. See `Decoder.extend`."""
        check_ids(target, self._decoding, plan)
        place = count_positions(target, valid, None, cache.seen).astype(jnp.float32)
        tokens = self.tokens(target, valid).replace(position=place[..., None])
        caching = {"caches": cache.layers, "fresh": fresh}
        ran, report = self._write(tokens, plan, call or Call(), memories, **caching)
        more = target.shape[1] if valid is None else valid.sum(-1)
        cache = KVCache(ran.caches, (cache.seen + more).astype(jnp.int32))
        head, end = self.logits, tokens.last_slot()
        y = head_at(head, ran.tokens, end) if last else head(ran.tokens)
        return y, cache, report

    def remember(self, memory: Tokens) -> tuple[Memory, ...]:
        """The memory as each layer of the decoder projects it, for decoding step by step."""
        return tuple(block.remember(memory) for block in self.decoder.blocks)

    def make_cache(self, batch: int, length: int, plan: Plan = DENSE) -> KVCache:
        """An empty cache for targets of up to `length` tokens; plan: of the decoder alone. Raises
        ValueError where it evicts entries."""
        if plan.at("cache"):
            raise ValueError(
                f"EncoderDecoder: plan {plan.name!r} reduces the cache, which is for a Decoder; "
                "leave it out."
            )
        c = self.config
        slots = slots_of(plan, c.decoder_depth, length)
        return make_cache(batch, c.heads, slots, c.head_dim, c.dtype or c.param_dtype)

    def logits(self, tokens: Tokens) -> Float[Array, "B M vocab"]:
        """In float32; with a tied table the features shrink first, as in T5."""
        if self.head is not None:
            return self.head(tokens.x).astype(jnp.float32)
        return self.embed.attend(tokens.x * self.config.width**-0.5).astype(jnp.float32)

    @property
    def _decoding(self) -> EncoderDecoderConfig:
        return dataclasses.replace(self.config, context=self.config.target_context)

    def _decoder_layout(self, tokens: int) -> Layout:
        return self.config.decoder_layout(tokens).alone


@dataclass(frozen=True)
class Conditioned:
    """A decoder with the memory that it looks at: what `generate` continues."""

    model: EncoderDecoder
    memories: tuple[Memory, ...]

    @property
    def config(self) -> EncoderDecoderConfig:
        return self.model._decoding

    def make_cache(
        self, batch: int, length: int, *, plan: Plan = DENSE, prompt: int | None = None
    ) -> KVCache:
        return self.model.make_cache(batch, length, plan)

    def extend(
        self, ids: Array, cache: KVCache, *, plan: Plan = DENSE, extra: Any = None, **how: Any
    ) -> tuple[Array, KVCache, Report]:
        return self.model.extend(ids, cache, self.memories, plan=plan, **how)
