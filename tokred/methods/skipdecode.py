"""SkipDecode (Del Corro et al. 2023, arXiv 2307.02628): the later a token, the fewer layers.

No official code exists. Where the paper is silent: generated tokens are counted from 0, the prompt
runs as deep as the first of them, one bottom layer always runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from tokred.methods import routing
from tokred.methods.registry import register
from tokred.plan import Layout, Plan, Reduction, Site
from tokred.tokens import Tokens, move


def depths_for(depth: int, speedup: float, warm: int = 1) -> tuple[int, int]:
    """(most, least) layers of a linear schedule whose mean is depth / speedup, rounded down; at
    least one layer above the `warm` ones. 32 layers at 2: 24, 8.

    The speed-up is nominal: embedding, head and prompt cost the same as before.

    Raises:
      ValueError: a speed-up below 1.
    """
    if not speedup >= 1:
        raise ValueError(f"skipdecode: speedup={speedup} must be at least 1; raise speedup.")
    most = min(float(depth), 1.5 * depth / speedup)
    floors = (int(value + 1e-6) for value in (most, 2 * depth / speedup - most))
    high, low = (min(depth, max(value, warm + 1)) for value in floors)
    return high, low


def active_layers(
    depth: int, steps: int, most: int, least: int, warm: int = 1
) -> Bool[np.ndarray, "T L"]:
    """Which layers the t-th generated token runs through: the first `warm` and the last
    E(t) - warm, with E falling linearly from `most` to `least`.

    Raises:
      ValueError: counts that do not fit the model, or a depth that rises with t.
    """
    if not (0 <= warm < least and most <= depth and steps >= 1):
        raise ValueError(
            f"skipdecode: expected warm={warm} < least={least}, most={most} <= {depth} layers and "
            f"steps={steps} >= 1; change the one that does not fit."
        )
    t = np.arange(steps) / max(steps - 1, 1)
    runs = np.floor(most - (most - least) * t + 0.5)[:, None]
    layer = np.arange(depth)[None]
    table = (layer < warm) | (layer >= depth - runs + warm)
    check_monotone(table)
    return table


def check_monotone(table: Bool[np.ndarray, "T L"]) -> None:
    """Raises ValueError where a layer comes back: the cache lacks what it did not see."""
    back = np.argwhere(table[1:] & ~table[:-1])
    if len(back):
        t, layer = back[0]
        raise ValueError(
            f"skipdecode: layer {layer} runs at t={t + 1} but not at t={t}, so that keys would be "
            "missing; give a schedule that never gets deeper (most >= least)."
        )


def first_idle(table: Bool[np.ndarray, "T L"]) -> tuple[int | None, ...]:
    """Per layer the first t that skips it, None where none does. What a monotone table amounts to.

    Raises ValueError where a layer comes back.
    """
    check_monotone(table)
    return tuple(None if row.all() else int(row.sum()) for row in table.T)


@dataclass(frozen=True)
class SkipDecode(Reduction):
    """The prompt and the first `until` generated tokens enter the layer, the same in every example.

    extra['generated'] tells which those are: the index of a generated token, -1 in the prompt. A
    token that skips leaves no keys. until=0: the layer is left out altogether.
    soft, causal: masked decisions; in decoding all examples decide alike, so with Call(skip=True)
    the layer is left out at run time. packed: `prompt` + until slots, where prompt is the length of
    the longest prompt, as many as tokens with None; what finds no slot skips and is counted.
    The twins agree exactly.
    """

    until: int
    prompt: int | None = None
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft", "causal")

    def counts(self, n: int, prefix: int) -> int:
        return 0 if self.until == 0 else self.cached(n)

    def slots(self, n: int, prefix: int, twin: str) -> int:
        return n if twin != "packed" and self.until else self.counts(n, prefix)

    def cached(self, length: int) -> int:
        if self.until == 0:
            return 1
        return length if self.prompt is None else min(length, self.prompt + self.until)

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
        t = jnp.asarray(routing.require_extra("skipdecode", tokens, "generated"))
        counts = lambda n: self.slots(n, tokens.prefix, twin)  # noqa: E731
        map_, overflow = routing.keep_chosen(t < self.until, counts, tokens.valid)
        aux = routing.describe(routing.selected(map_), tokens.valid)
        if self.until:
            aux["overflow"] = overflow
        return move(tokens, map_), map_, state, aux


@register("skipdecode", family="skip", site="around", twins="exact", paper="SkipDecode 2023")
def skipdecode(
    layout: Layout,
    *,
    keep: float = 0.5,
    steps: int | None = None,
    most: int | None = None,
    least: int | None = None,
    warm: int = 1,
    prompt: int | None = None,
) -> Plan:
    """Depth falls linearly with the position of a generated token; lower layers are skipped first.

    keep: mean share of the layers that generated tokens run through, 1 / speed-up. steps: most new
    tokens, default the context; later ones run like the last. most, least: layers of the first and
    the last, instead of `depths_for`. warm: bottom layers that always run. prompt: length of the
    longest prompt, to save slots in the cache and in training; see `SkipDecode`.
    """
    high, low = depths_for(layout.depth, 1 / keep, warm)
    most, least = (high if most is None else most), (low if least is None else least)
    steps = layout.tokens if steps is None else steps
    idle = first_idle(active_layers(layout.depth, steps, most, least, warm))
    return Plan(
        tuple(
            (Site("around", layer), SkipDecode(until, prompt))
            for layer, until in enumerate(idle)
            if until is not None
        ),
        name="skipdecode",
    )
