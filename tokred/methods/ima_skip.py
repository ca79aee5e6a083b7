"""Computation skipping of Implicit Multimodal Alignment (Shukor & Cord 2024): chosen layers, or one
branch of them, are left out for prompts, for generated tokens, or for a perceptual prefix.

Official code: mshukor/ima-lmms. A skipped attention leaves no keys here; the reference writes
placeholders. Left out: intervals drawn at random; parallel attention, whose MLP reads the layer's
first norm; and parallel blocks, whose keys are a mean over two layers. In both a branch reads what
another one does, which no map between tokens says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool

from tokred.methods import routing
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Reduction, Site
from tokred.tokens import Tokens, move

MODES = {"skip_ffn": "around_mlp", "skip_attn": "around_attention", "skip_block": "around"}
PHASES = ("prefill", "decode", "both")


@dataclass(frozen=True)
class ImaSkip(Reduction):
    """All tokens of a phase skip; with `prefix` those of the first `prefix` positions alone.

    packed: a prompt, whose tokens are gathered, or left out altogether (phase 'decode': nobody
    skips). soft, causal: every token by itself; where the phase matters, extra['generated'] tells
    it: the index of a generated token, -1 in the prompt. Where all skip in both phases, the layer
    is left out by the plan; else in decoding at run time, with Call(skip=True).
    The twins agree exactly on a prompt.
    """

    phase: str = "both"
    prefix: int | None = None
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(
                f"ima_skip: phase={self.phase!r} must be one of {PHASES}; change phase."
            )
        if self.prefix is not None and self.prefix < 1:
            raise ValueError(
                f"ima_skip: prefix={self.prefix} must be at least 1, or None for all positions; "
                "change prefix."
            )

    @property
    def _never(self) -> bool:
        return self.phase == "both" and self.prefix is None

    def counts(self, n: int, prefix: int) -> int:
        if self.phase == "decode":
            return n
        return 0 if self.prefix is None else max(0, n - self.prefix)

    def slots(self, n: int, prefix: int, twin: str) -> int:
        return self.counts(n, prefix) if twin == "packed" or self._never else n

    def cached(self, length: int) -> int:
        return 1 if self._never else length

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
        if twin == "packed" and self.phase == "decode":
            return tokens, None, state, {}
        counts = lambda n: self.slots(n, tokens.prefix, twin)  # noqa: E731
        enters = ~self._skips(tokens, twin)
        map_, overflow = routing.keep_chosen(enters, counts, tokens.valid)
        aux = routing.describe(routing.selected(map_), tokens.valid)
        return move(tokens, map_), map_, state, {**aux, "overflow": overflow}

    def _skips(self, tokens: Tokens, twin: str) -> Bool[Array, "*B N"]:
        skips = jnp.ones((*tokens.batch, tokens.n), bool)
        if self.prefix is not None:
            skips &= tokens.position[..., 0] < self.prefix
        if twin != "packed" and self.phase != "both":
            generated = routing.require_extra("ima_skip", tokens, "generated") >= 0
            skips &= generated if self.phase == "decode" else ~generated
        return skips


def skipped_layers(
    depth: int,
    interval: int | Sequence[int],
    start: int = 0,
    end: int | None = None,
) -> tuple[int, ...]:
    """Layers strictly inside (start, end) whose index is a multiple of `interval`; end: the last
    layer by default. A list gives one interval for each of as many equal segments of the depth.

    Raises:
      ValueError: an interval below 1.
    """
    intervals = (interval,) if isinstance(interval, int) else tuple(interval)
    if not intervals or min(intervals) < 1:
        raise ValueError(
            f"ima_skip: interval={interval} must be at least 1, or a list of such; change interval."
        )
    last = depth - 1 if end is None else end
    own = lambda layer: intervals[layer * len(intervals) // depth]  # noqa: E731
    return tuple(i for i in range(start + 1, min(last, depth)) if i % own(i) == 0)


@register("ima_skip", family="skip", site="around_mlp", twins="exact", paper="IMA 2024")
def ima_skip(
    layout: Layout,
    *,
    keep: float = 0.5,
    mode: str = "skip_ffn",
    interval: int | Sequence[int] | None = None,
    start: int = 0,
    end: int | None = None,
    phase: str = "both",
    prefix: int | None = None,
) -> Plan:
    """Every second FFN, attention or layer is left out, for all tokens or a perceptual prefix.

    keep: share of the layers between start and end that stay whole, as 1 - 1 / interval, unless
    `interval` is given. mode: 'skip_ffn', 'skip_attn' or 'skip_block'. interval, start, end: see
    `skipped_layers`. phase, prefix: see `ImaSkip`.
    """
    if mode not in MODES:
        raise ValueError(f"ima_skip: mode={mode!r} must be one of {tuple(MODES)}; change mode.")
    layers: tuple[int, ...] = ()
    if interval is not None or keep < 1:
        every = max(1, round(1 / (1 - keep))) if interval is None else interval
        layers = skipped_layers(layout.depth, every, start, end)
    reduction = ImaSkip(phase, prefix)
    return Plan(tuple((Site(MODES[mode], i), reduction) for i in layers), name="ima_skip")
