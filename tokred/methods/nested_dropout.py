"""Nested dropout of latent tokens, so that any first few of them will do: FlexTok (Bachmann et al.
2025, arXiv 2502.13967; apple/ml-flextok, Apple sample-code licence) and One-D-Piece (Miwa et al.
2025, arXiv 2501.10064; turingmotors/One-D-Piece, Apache-2.0).

The mechanism alone: a model's last `latents` tokens stand for the latent tokens of the papers'
tokenizers (all behind the prefix by default), the layers after the site for their decoders, or at
'output' whatever reads the tokens. Quantisers, decoders of pixels, FlexTok's registers of fewer
rows (`tokred.nested.registers_of`) and its causal masks are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tokred.methods import routing
from tokred.methods.registry import register
from tokred.nested import keep_first, keep_within, lengths_of, replace_tail, sample_length
from tokred.plan import Layout, Plan, Reduction, require_module
from tokred.tokens import Tokens, move

TAILS = ("hide", "replace")


class MaskToken(nnx.Module):
    """What stands where a token was dropped; at first small and random.

    Source: apple/ml-flextok `MaskedNestedDropout`.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        start = nnx.initializers.truncated_normal(0.02)
        self.token = nnx.Param(start(rngs.params(), (width,), jnp.float32))

    def __call__(self) -> Float[Array, " D"]:
        return self.token[...]


@dataclass(frozen=True)
class NestedDropout(Reduction):
    """Of the last `latents` tokens the first `length` stay; the others always do.

    packed: the tail is cut off. soft: it stays in its slots, hidden (tail='hide'), or replaced by
    a learned mask token, which others see (tail='replace'). In training under 'soft' a length is
    drawn instead, for each example, or one for all (`shared`), by rule, values and weights of
    `nested.sample_length`; it is aux 'length' [*B]. Hidden is cut off, exactly; replaced differs
    by design. Static: the slots.
    Gradient: to the tokens that stay, and to the mask token where it replaces some.
    """

    latents: int
    length: int
    tail: str = "hide"
    shared: bool = False
    rule: str = "uniform"
    values: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft")

    def __post_init__(self) -> None:
        if not 1 <= self.length <= self.latents:
            raise ValueError(
                f"NestedDropout: length={self.length} must lie in [1, latents={self.latents}]; "
                "change one of the two."
            )
        if self.tail not in TAILS:
            raise ValueError(f"NestedDropout: tail={self.tail!r} must be one of {TAILS}.")
        lengths_of(self.latents, self.rule, self.values)

    def counts(self, n: int, prefix: int) -> int:
        latents = min(self.latents, n - prefix)
        return n - latents + min(self.length, latents)

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> MaskToken | None:
        return MaskToken(width, rngs=rngs) if self.tail == "replace" else None

    def __call__(
        self,
        tokens: Tokens,
        evidence: Mapping[str, Array],
        state: Any = None,
        *,
        module: Any = None,
        key: Any = None,
        train: bool = False,
        twin: str = "packed",
    ) -> tuple[Tokens, Any, Any, dict[str, Any]]:
        n, soft = tokens.n, twin == "soft"
        if self.idle(n, tokens.prefix) and not (soft and train):
            return tokens, None, state, {}
        others, valid = n - min(self.latents, n - tokens.prefix), tokens.valid
        if not soft:
            k = self.counts(n, tokens.prefix) - others
            map_ = keep_first(n, k, tokens.batch, prefix=others, valid=valid)
            return move(tokens, map_), map_, state, {}
        length = self._draw(key, n - others, tokens.batch) if train else self.length
        length = jnp.broadcast_to(length, tokens.batch)
        if self.tail == "replace":
            mask_token = require_module(self, module)()
            tokens = tokens.replace(x=replace_tail(tokens.x, length, mask_token, prefix=others))
            return tokens, None, state, {"length": length}
        map_ = keep_within(length, n, prefix=others, valid=valid)
        return move(tokens, map_), map_, state, {"length": length}

    def _draw(self, key: Any, maximum: int, batch: tuple[int, ...]) -> Int[Array, "..."]:
        if key is None:
            raise ValueError(
                "NestedDropout: training draws lengths; pass a key, call=Call(key=..., train=True)."
            )
        shape = () if self.shared else batch
        return sample_length(
            key, maximum, self.rule, shape=shape, values=self.values, weights=self.weights
        )


@register(
    "flextok",
    family="nested",
    site="after",
    learned=True,
    twins="different",
    paper="FlexTok 2025",
    golden=("core/flextok__nested", "gen/nested_dropout", "gen/registers"),
)
def flextok(
    layout: Layout,
    *,
    keep: float = 0.5,
    latents: int | None = None,
    layer: int | None = None,
    site: str = "after",
    rule: str = "uniform",
    values: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Plan:
    """Each example keeps the first few latent tokens; a mask token replaces the others in training.

    FlexTok (arXiv 2502.13967, apple/ml-flextok), its nested dropout alone: no registers, quantiser
    or flow decoder. The released code replaces in inference too, which is the soft twin; packed,
    they are cut off. keep: the share of the latent tokens that stays outside training. Other
    options: see `routing.place_latents` and `nested.sample_length`.
    """
    where, latents = routing.place_latents("flextok", layout, latents, layer, site)
    draws = {"rule": rule, "values": _fixed(values), "weights": _fixed(weights)}
    length = routing.room_of(latents, keep)
    reduction = NestedDropout(latents, length, tail="replace", **draws)
    return Plan(((where, reduction),), name="flextok")


@register(
    "onedpiece",
    family="nested",
    site="after",
    twins="exact",
    paper="One-D-Piece 2025",
    golden=("gen/onedpiece__decode_lengths",),
)
def onedpiece(
    layout: Layout,
    *,
    keep: float = 0.5,
    latents: int | None = None,
    layer: int | None = None,
    site: str = "after",
    rule: str = "uniform",
    values: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Plan:
    """The tail of the latent tokens is cut off, in training at one drawn length for all examples.

    One-D-Piece (arXiv 2501.10064, turingmotors/One-D-Piece), its Tail Token Drop alone: no
    tokenizer around it. The soft twin hides what the released code cuts off, so that one program
    serves all lengths. keep: the share of the latent tokens that stays outside training. Other
    options: see `routing.place_latents` and `nested.sample_length`.
    """
    where, latents = routing.place_latents("onedpiece", layout, latents, layer, site)
    draws = {"rule": rule, "values": _fixed(values), "weights": _fixed(weights)}
    length = routing.room_of(latents, keep)
    reduction = NestedDropout(latents, length, tail="hide", shared=True, **draws)
    return Plan(((where, reduction),), name="onedpiece")


def _fixed(entries: Sequence | None) -> tuple | None:
    """Hashable, as a plan is."""
    return None if entries is None else tuple(entries)
