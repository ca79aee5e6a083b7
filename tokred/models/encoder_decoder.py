"""Encoder-decoders of T5 v1.1's architecture (ByT5): a plan acts in the encoder.

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
from tokred.models.decoder import check_ids, count_positions
from tokred.models.sizes import BYTE_T5, make_config
from tokred.nn.layers import Layers, LayersRan
from tokred.nn.mlp import ACTIVATIONS
from tokred.nn.t5_block import RelativeBias, T5Block, T5Shape, t5_norm
from tokred.plan import Layout, Plan, nearest
from tokred.report import Call, Report, make_report, reduce_model
from tokred.tokens import Tokens

DENSE = Plan()
START = 0  # the id that a target begins with


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Everything that shapes an encoder-decoder; all fields are static.

    depth: layers of the encoder. context, target_context: most tokens of a source and of a target;
    positions are relative, so that neither bounds what is learned. tie: the output reads the
    embedding table. sink: attention may look at nothing (softmax1), in both stacks. Other fields:
    see `T5Shape`. scan: see `Layers`.
    """

    vocab: int = 384
    width: int = 256
    depth: int = 6
    decoder_depth: int = 2
    heads: int = 4
    head_dim: int = 64
    hidden: int = 640
    activation: str = "gelu_tanh"
    buckets: int = 32
    max_distance: int = 128
    context: int = 1024
    target_context: int = 256
    norm_eps: float = 1e-6
    sink: bool = False
    tie: bool = False
    scan: bool = False
    attention: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"EncoderDecoderConfig: activation={self.activation!r} must be one of {ACTIVATIONS}"
                f"{nearest(self.activation, ACTIVATIONS)}"
            )

    @property
    def layout(self) -> Layout:
        """What plans may know of the encoder, with a full context of tokens."""
        return self.layout_of(self.context)

    def layout_of(self, tokens: int) -> Layout:
        """The same for sources of another length."""
        return Layout.of_sequence(self.depth, tokens, self.width, self.heads)

    @property
    def projection_macs(self) -> tuple[int, int, int]:
        """Of one token's query, key and value."""
        one = self.pair_macs * self.width
        return one, one, one

    @property
    def pair_macs(self) -> int:
        """Of one query's logits or values with one key, all heads."""
        return self.heads * self.head_dim

    def layer_macs(self, projected: Any, queries: Any, keys: Any, mlp: Any) -> Any:
        """Of one layer of either stack, at these token counts."""
        inner = self.pair_macs
        attended = 3 * projected * inner * self.width + 2 * queries * keys * inner
        return attended + queries * inner * self.width + 3 * mlp * self.width * self.hidden

    def outer_macs(self, tokens: Any) -> Any:
        """Of the decoder with a target of `target_context` tokens and a memory of so many."""
        m, inner = self.target_context, self.pair_macs
        cross = 2 * (m + tokens) * inner * self.width + 2 * m * tokens * inner
        layers = self.decoder_depth * (self.layer_macs(m, m, m, m) + cross)
        return layers + m * self.width * self.vocab

    def shape(self, part: str) -> T5Shape:
        """Of the blocks of the 'encoder' or the 'decoder'."""
        same = {f.name for f in dataclasses.fields(T5Shape)} & {
            f.name for f in dataclasses.fields(self)
        }
        fields = {name: getattr(self, name) for name in same}
        both = part == "decoder"
        return T5Shape(**fields, causal=both, cross=both, implementation=self.attention)


def encoder_decoder_config(name: str, **changes: Any) -> EncoderDecoderConfig:
    """A size by name, such as 'byt5_tiny' or 'byt5_small': see `sizes.BYTE_T5`.

    changes: fields of EncoderDecoderConfig. Raises ValueError for an unknown size or field.
    """
    return make_config(EncoderDecoderConfig, BYTE_T5, name, changes)


class Stack(nnx.Module):
    """Blocks that share one relative bias, and a norm at the end."""

    def __init__(self, shape: T5Shape, depth: int, *, scan: bool, rngs: nnx.Rngs):
        self.scan = scan
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
    """source [B N], target [B M] -> (logits [B M vocab], Report), under any Plan in the encoder.

    plan: only its learned reductions matter here; their modules become `reductions`.
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
        self.reductions = nnx.Dict(plan.build(c.layout, rngs))

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
        arrays [B N ...] of the source that reductions read by name. Static: plan.

        Raises:
          ValueError: a sequence longer than its context, or a plan that does not fit the encoder.
          TypeError: ids that are no integers.
        """
        memory, report = self.encode(ids, plan=plan, call=call, valid=valid, extra=extra)
        return self.decode(target, memory, call=call), report

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
        self, target: Int[Array, "B M"], memory: Tokens, *, call: Call | None = None
    ) -> Float[Array, "B M vocab"]:
        """Logits of what follows each target token, in float32."""
        call, memories = call or Call(), (Memory(memory),) * self.config.decoder_depth
        check_ids(target, self._decoding, DENSE)
        tokens = self.tokens(target)
        layout = self._decoder_layout(tokens.n)
        return self.logits(self.decoder(tokens, DENSE, call, layout, memories).tokens)

    def extend(
        self,
        target: Int[Array, "B M"],
        cache: KVCache,
        memories: Sequence[Memory],
        *,
        call: Call | None = None,
        valid: Bool[Array, "B M"] | None = None,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B M vocab"], KVCache, Report]:
        """M more target tokens: they follow those that `cache` has seen. See `Decoder.extend`."""
        check_ids(target, self._decoding, DENSE)
        place = count_positions(target, valid, None, cache.seen).astype(jnp.float32)
        tokens = self.tokens(target, valid).replace(position=place[..., None])
        layout, caching = self._decoder_layout(tokens.n), {"caches": cache.layers, "fresh": fresh}
        ran = self.decoder(tokens, DENSE, call or Call(), layout, memories, **caching)
        more = target.shape[1] if valid is None else valid.sum(-1)
        cache = KVCache(ran.caches, (cache.seen + more).astype(jnp.int32))
        report = make_report(ran.tokens, ran.records, ran.sources, DENSE.counts(layout))
        return self.logits(ran.tokens), cache, report

    def remember(self, memory: Tokens) -> tuple[Memory, ...]:
        """The memory as each layer of the decoder projects it, for decoding step by step."""
        return tuple(block.remember(memory) for block in self.decoder.blocks)

    def make_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for targets of up to `length` tokens."""
        c = self.config
        slots = [length] * c.decoder_depth
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
        depth = self.config.decoder_depth
        return dataclasses.replace(self.config.layout_of(tokens), depth=depth)


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
        return self.model.make_cache(batch, length)

    def extend(
        self, ids: Array, cache: KVCache, *, plan: Plan = DENSE, extra: Any = None, **how: Any
    ) -> tuple[Array, KVCache, Report]:
        return self.model.extend(ids, cache, self.memories, **how)
