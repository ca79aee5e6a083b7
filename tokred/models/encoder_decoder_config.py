"""What shapes an encoder-decoder, and what each of its stacks costs."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tokred.models.sizes import BYTE_T5, make_config
from tokred.nn.mlp import ACTIVATIONS
from tokred.nn.t5_block import T5Shape
from tokred.plan import Layout, Plan, nearest

DENSE = Plan()


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

    def outer_macs(self, tokens: Any) -> int:
        """None: what is no layer lies between the stacks, see `joint_macs`."""
        return 0

    def decoder_layout(self, tokens: int | None = None, plan: Plan = DENSE) -> Layout:
        """What plans may know of the decoder, by default with a full target; what a plan does
        before it changes nothing of that."""
        n = self.target_context if tokens is None else tokens
        alone = Layout.of_sequence(self.decoder_depth, n, self.width, self.heads)
        return dataclasses.replace(alone, part="decoder")

    def parts(self, plan: Plan, tokens: int | None) -> dict[str, tuple[Any, int | None, int]]:
        """What each stack costs, see `cost.macs`; tokens: of a source. The target is full."""
        n = self.context if tokens is None else tokens
        encoder: dict[str, tuple[Any, int | None, int]] = {"": (self, n, 1)}
        if not self.decoder_depth:
            return encoder
        decoder = DecoderCost(self, self.memory_tokens(n, plan))
        return {**encoder, "decoder": (decoder, self.target_context, 1)}

    def joint_macs(self, plan: Plan, tokens: int | None) -> int:
        """Of the memory's keys and values for every layer of the decoder, and of the logits."""
        n = self.memory_tokens(self.context if tokens is None else tokens, plan)
        keys = 2 * self.decoder_depth * n * self.pair_macs * self.width
        return keys + self.target_context * self.width * self.vocab

    def memory_tokens(self, tokens: int, plan: Plan) -> int:
        """How many slots of a source's tokens the decoder looks at."""
        mine, layout = plan.of(""), self.layout_of(tokens)
        n = mine.counts(layout)[-1].out if self.depth else tokens
        for _, reduction in mine.at("output"):
            n = reduction.slots(n, layout.prefix, mine.twin)
        return n

    def shape(self, part: str) -> T5Shape:
        """Of the blocks of the 'encoder' or the 'decoder'."""
        same = {f.name for f in dataclasses.fields(T5Shape)} & {
            f.name for f in dataclasses.fields(self)
        }
        fields = {name: getattr(self, name) for name in same}
        both = part == "decoder"
        return T5Shape(**fields, causal=both, cross=both, implementation=self.attention)


@dataclass(frozen=True)
class DecoderCost:
    """What the decoder's layers cost that look at a memory of so many tokens, see `cost.Costed`."""

    config: EncoderDecoderConfig
    memory: int

    @property
    def depth(self) -> int:
        return self.config.decoder_depth

    @property
    def layout(self) -> Layout:
        return self.layout_of(self.config.target_context)

    def layout_of(self, tokens: int) -> Layout:
        return self.config.decoder_layout(tokens).alone

    @property
    def projection_macs(self) -> tuple[int, int, int]:
        return self.config.projection_macs

    @property
    def pair_macs(self) -> int:
        return self.config.pair_macs

    def layer_macs(self, projected: Any, queries: Any, keys: Any, mlp: Any) -> Any:
        """Those that enter the MLP look at the memory before."""
        looked = 2 * mlp * self.pair_macs * (self.config.width + self.memory)
        return self.config.layer_macs(projected, queries, keys, mlp) + looked

    def outer_macs(self, tokens: Any) -> int:
        return 0


def encoder_decoder_config(name: str, **changes: Any) -> EncoderDecoderConfig:
    """A size by name, such as 'byt5_tiny' or 'byt5_small': see `sizes.BYTE_T5`.

    changes: fields of EncoderDecoderConfig. Raises ValueError for an unknown size or field.
    """
    return make_config(EncoderDecoderConfig, BYTE_T5, name, changes)
