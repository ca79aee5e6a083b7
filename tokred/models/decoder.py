"""Decoders (Llama, Qwen, Gemma, Mistral, GPT-2) whose blocks offer every site."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from tokred.cache import PLAIN, Extent, KVCache, cache_reduction, make_cache
from tokred.models.ids import check_ids, count_positions, head_at
from tokred.models.sizes import DECODERS, make_config
from tokred.nn.decoder_block import BlockShape, DecoderBlock, make_norm, same
from tokred.nn.layers import Layers
from tokred.nn.mlp import ACTIVATIONS
from tokred.plan import Layout, Plan, nearest
from tokred.report import Call, Report, make_report, reduce_model
from tokred.rotary import RopeScaling
from tokred.tokens import Tokens, make_tokens

DENSE = Plan()


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that shapes a decoder; all fields are static.

    context: positions it may use. kv_heads: shared by heads / kv_heads query heads each; None for
    as many. head_dim: None for width / heads. hidden: of the gated MLP, None for 8/3 width in
    multiples of 64. window: how many places back a query sees, None for all; in every layer but
    each `global_every`-th. tie: the output reads the embedding table. logit_cap, attention_cap:
    bound logits c as cap tanh(c / cap). scale_embed: embeddings times sqrt(width). local_theta:
    rope_theta of the layers with a window, whose turns are not scaled, None for the same.
    rotary=False: a learned embedding per position. segments: kinds of text with an embedding each,
    0 for none. embed_norm: a norm behind the embeddings. final_norm: one behind the layers. Other
    fields: see `BlockShape`. scan: see `Layers`.
    """

    vocab: int = 259
    width: int = 512
    depth: int = 8
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    context: int = 2048
    activation: str = "silu"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_theta: float | None = None
    rotary: bool = True
    causal: bool = True
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_first: bool = True
    embed_norm: bool = False
    final_norm: bool = True
    segments: int = 0
    gated: bool = True
    bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False
    window: int | None = None
    global_every: int = 0
    tie: bool = True
    logit_cap: float | None = None
    attention_cap: float | None = None
    scale_embed: bool = False
    experts: int = 0
    experts_per_token: int = 2
    scan: bool = False
    attention: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        defaults = {
            "kv_heads": self.heads,
            "head_dim": self.width // self.heads,
            "hidden": -(-8 * self.width // 3 // 64) * 64,
        }
        for field, value in defaults.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        self._check()

    def _check(self) -> None:
        if self.heads % self.groups:
            raise ValueError(
                f"DecoderConfig: heads={self.heads} must be a multiple of kv_heads={self.groups}; "
                "change one of the two."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"DecoderConfig: activation={self.activation!r} must be one of {ACTIVATIONS}"
                f"{nearest(self.activation, ACTIVATIONS)}"
            )
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"DecoderConfig: norm={self.norm!r} must be 'rms' or 'layer'.")
        if self.rotary and self.shape(0).head_dim % 2:
            raise ValueError(
                f"DecoderConfig: head_dim={self.head_dim} must be even for rotary positions; "
                "change width, heads or head_dim."
            )

    @property
    def groups(self) -> int:
        """G, the number of key heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def layout(self) -> Layout:
        """What plans may know of this model, with a full context of tokens."""
        return self.layout_of(self.context)

    def layout_of(self, tokens: int) -> Layout:
        """The same for sequences of another length."""
        return Layout.of_sequence(self.depth, tokens, self.width, self.heads)

    @property
    def projection_macs(self) -> tuple[int, int, int]:
        """Of one token's query, key and value."""
        shape = self.shape(0)
        small = self.width * shape.kv_heads * shape.head_dim
        return self.pair_macs * self.width, small, small

    @property
    def pair_macs(self) -> int:
        """Of one query's logits or values with one key, all heads."""
        return self.heads * self.shape(0).head_dim

    def layer_macs(self, projected: Any, queries: Any, keys: Any, mlp: Any) -> Any:
        """Of one layer, at these token counts, as they are computed: every query with every key,
        every token by all experts."""
        projections = projected * sum(self.projection_macs)
        out = queries * self.pair_macs * self.width
        attended = 2 * queries * keys * self.pair_macs
        each = (2 + self.gated) * self.width * self.shape(0).hidden
        feed = max(self.experts, 1) * each + self.experts * self.width
        return projections + out + attended + mlp * feed

    def outer_macs(self, tokens: Any) -> Any:
        """Of the logits of so many tokens."""
        return tokens * self.width * self.vocab

    def shape(self, layer: int) -> BlockShape:
        """Of one layer's block."""
        same = {f.name for f in dataclasses.fields(BlockShape)} & {
            f.name for f in dataclasses.fields(self)
        }
        fields = {name: getattr(self, name) for name in same}
        far = self.global_every and (layer + 1) % self.global_every == 0
        near = {"rope_theta": self.local_theta, "rope_scaling": None}
        return BlockShape(**{
            **fields,
            "window": None if far else self.window,
            **({} if far or self.local_theta is None else near),
            "implementation": self.attention,
        })  # fmt: skip


def decoder_config(name: str, **changes: Any) -> DecoderConfig:
    """A size by name, such as 'lm_10m', 'lm_1b', 'llama3_8b': see `sizes.DECODERS`.

    changes: fields of DecoderConfig. Raises ValueError for an unknown size or field.
    """
    return make_config(DecoderConfig, DECODERS, name, changes)


class Decoder(nnx.Module):
    """ids [B N] -> (logits [B K vocab], Report), under any Plan. K = N unless tokens leave: then
    `Report.restore` puts the logits in place.

    plan: only its learned reductions matter here; their modules become `reductions`.
    """

    def __init__(self, config: DecoderConfig, *, plan: Plan = DENSE, rngs: nnx.Rngs):
        self.config = config
        c, kinds = config, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        table = lambda rows: nnx.Embed(  # noqa: E731
            rows, c.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs, **kinds
        )
        self.embed = table(c.vocab)
        self.places = None if c.rotary else table(c.context)
        self.segments = table(c.segments) if c.segments else None
        self.embed_norm = make_norm(c, c.width, rngs) if c.embed_norm else None
        self.blocks = nnx.List(DecoderBlock(c.shape(i), rngs=rngs) for i in range(c.depth))
        self.norm = make_norm(c, c.width, rngs) if c.final_norm else same
        self.head = None if c.tie else nnx.Linear(
            c.width, c.vocab, use_bias=False, rngs=rngs, **kinds
        )  # fmt: skip
        self.reductions = nnx.Dict(plan.build(c.layout, rngs))

    def __call__(
        self,
        ids: Int[Array, "B N"],
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        valid: Bool[Array, "B N"] | None = None,
        position: Num[Array, "B N"] | None = None,
        document: Int[Array, "B N"] | None = None,
        ordered: bool = False,
        extra: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B K vocab"], Report]:
        """valid: which tokens are real (None: all), padding on either side. position: of each token
        (None: counted over the valid ones); document: tokens of different ones do not see each
        other. ordered: positions that are given rise from slot to slot within every document, so
        that kernels may leave out what lies behind. extra: per-token arrays [B N ...] that
        reductions read by name. Static: plan, ordered.

        Raises:
          ValueError: a sequence longer than the context, or a plan that does not fit the model.
          TypeError: ids that are no integers.
        """
        given = {"position": position, "document": document, "extra": extra}
        tokens = self.embedded(ids, plan=plan, valid=valid, ordered=ordered, **given)
        tokens, report, _ = self.decode(tokens, plan=plan, call=call)
        return self.logits(tokens), report

    def embedded(
        self,
        ids: Int[Array, "B N"],
        *,
        plan: Plan = DENSE,
        valid: Bool[Array, "B N"] | None = None,
        position: Num[Array, "B N"] | None = None,
        document: Int[Array, "B N"] | None = None,
        ordered: bool = False,
        extra: dict[str, Array] | None = None,
    ) -> Tokens:
        """What enters the layers; arguments and errors as in a call."""
        check_ids(ids, self.config, plan)
        place = count_positions(ids, valid, position, jnp.zeros((ids.shape[0],), jnp.int32))
        tokens = self.tokens(ids, valid, place, document, extra)
        return tokens.replace(ordered=ordered or (position is None and document is None))

    def extend(
        self,
        ids: Int[Array, "B N"],
        cache: KVCache,
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        valid: Bool[Array, "B N"] | None = None,
        extra: dict[str, Array] | None = None,
        fresh: bool = False,
        last: bool = False,
    ) -> tuple[Float[Array, "B K vocab"], KVCache, Report]:
        """Prefill, or N more tokens: they follow those that `cache` has seen.

        fresh: the cache is empty, so that the tokens need not look at its slots. last: logits
        [B 1 vocab] behind each row's last valid token alone, which is what costs least. Both
        static. Other arguments and errors as in a call.
        """
        check_ids(ids, self.config, plan)
        place = count_positions(ids, valid, None, cache.seen)
        tokens = self.tokens(ids, valid, place, None, extra).replace(ordered=True)
        end = tokens.last_slot()
        tokens, report, filled = self.decode(tokens, plan=plan, call=call, cache=cache, fresh=fresh)
        more = ids.shape[1] if valid is None else valid.sum(-1)
        layers = cache.layers if filled is None else filled.layers
        cache = cache.advance(layers, cache.seen + more)
        y = self.logits_at(tokens, end) if last else self.logits(tokens)
        return y, cache, report

    def make_cache(
        self, batch: int, length: int, *, plan: Plan = DENSE, prompt: int | None = None
    ) -> KVCache:
        """An empty cache for sequences of up to `length` tokens, of which the first `prompt` (None:
        all) come at once. Layers that tokens may skip hold as many slots as their reduction asks
        for (`Reduction.cached`), all layers under an `Eviction` as many as that."""
        c, reduction = self.config, cache_reduction(plan)
        head_dim, dtype = c.shape(0).head_dim, c.dtype or c.param_dtype
        if reduction is not PLAIN:
            first = length if prompt is None else prompt
            slots = [reduction.room(first, length, layer, c.depth) for layer in range(c.depth)]
            heads = 1 if reduction.pooled else c.groups
            slots = [count * (c.groups // heads) for count in slots]
            cache = make_cache(batch, heads, slots, head_dim, dtype, reduction.raw)
            extent = Extent(first, length)
            made = (dataclasses.replace(layer, extent=extent) for layer in cache.layers)
            settled = tuple(reduction.settle(layer) for layer in made)
            return dataclasses.replace(cache, layers=settled)
        return make_cache(batch, c.groups, slots_of(plan, c.depth, length), head_dim, dtype)

    def tokens(
        self,
        ids: Int[Array, "B N"],
        valid: Bool[Array, "B N"] | None,
        position: Num[Array, "B N"],
        document: Int[Array, "B N"] | None = None,
        extra: dict[str, Array] | None = None,
    ) -> Tokens:
        """Embedded tokens at their positions, of the segments in extra['segment'] (default: the
        first)."""
        x = self.embed(ids)
        if self.config.scale_embed:
            x = x * jnp.asarray(self.config.width**0.5, x.dtype)
        if self.segments is not None:
            x = x + self.segments((extra or {}).get("segment", jnp.zeros_like(ids)))
        if self.places is not None:
            x = x + self.places(jnp.maximum(position, 0).astype(jnp.int32))
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        place = [position] if document is None else [position, document]
        place = jnp.stack([p.astype(jnp.float32) for p in place], -1)
        return make_tokens(x, valid=valid, position=place, extra=extra or {})

    def decode(
        self,
        tokens: Tokens,
        *,
        plan: Plan = DENSE,
        call: Call | None = None,
        cache: KVCache | None = None,
        fresh: bool = False,
    ) -> tuple[Tokens, Report, KVCache | None]:
        """All layers and the final norm; the Report tells what the plan did."""
        c, call = self.config, call or Call()
        counts = plan.counts(c.layout_of(tokens.n))
        call = dataclasses.replace(call, modules={**self.reductions, **call.modules})
        tokens, first = reduce_model(plan, "input", tokens, call)
        caches = None if cache is None else cache.layers
        ran = Layers(self.blocks, scan=c.scan)(
            tokens, plan, call, counts, caches=caches, fresh=fresh
        )
        tokens = ran.tokens.replace(x=self.norm(ran.tokens.x))
        tokens, last = reduce_model(plan, "output", tokens, call)
        report = make_report(tokens, first + ran.records + last, ran.sources, counts)
        if cache is not None:
            cache = dataclasses.replace(cache, layers=ran.caches)
        return tokens, report, cache

    def logits(self, tokens: Tokens) -> Float[Array, "B N vocab"]:
        """Of the next token after each, in float32."""
        y = self.embed.attend(tokens.x) if self.head is None else self.head(tokens.x)
        y, cap = y.astype(jnp.float32), self.config.logit_cap
        return y if cap is None else cap * jnp.tanh(y / cap)

    def logits_at(self, tokens: Tokens, place: Int[Array, "B M"]) -> Float[Array, "B M vocab"]:
        """Of the tokens that stood at these places, see `head_at`."""
        return head_at(self.logits, tokens, place)


def slots_of(plan: Plan, depth: int, length: int) -> list[int]:
    """Of each layer's cache: as many as the reductions ask for by which tokens may skip it."""
    skipped = [
        (*plan.at("around", layer), *plan.at("around_attention", layer), *plan.enclosing(layer))
        for layer in range(depth)
    ]
    return [min([length, *(r.cached(length) for _, r in steps)]) for steps in skipped]
