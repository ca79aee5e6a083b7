"""PiToMe (Tran et al. 2024): tokens of large clusters merge, by an energy; the others stay.

Official code: hchautran/PiToMe (CC-BY-NC 4.0), which is followed but for one thing: its ViT patch
counts sizes without adding their logarithm to attention (proportional=False).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokred.maps import Assign
from tokred.methods.registry import register
from tokred.methods.tome import KEYS, ToMe
from tokred.ops import gather
from tokred.plan import Layout, Plan, Site
from tokred.schedule import geometric
from tokred.score import cosine, score_by_energy
from tokred.select import match_sets, rank_tokens
from tokred.select.rows import static_rows
from tokred.tokens import Tokens

SPLITS = ("alternate", "halves", "closest")
KERNELS = ("elu", "gaussian")


@dataclass(frozen=True)
class PiToMe(ToMe):
    """Ranks tokens by energy, the mean of elu(cosine of keys - margin, alpha) over all, and merges
    `r` of them.

    split: 'alternate' the 2r tokens of the highest energy merge, every first one into its most
    similar second one · 'halves' the upper r of them into the lower r (official for text) ·
    'closest' of all tokens, alternately, the r most similar first ones do (official in the first
    half of the layers). kernel: see `score_by_energy`; 'gaussian' for text.
    """

    margin: float = 0.5
    alpha: float = 1.0
    split: str = "alternate"
    kernel: str = "elu"

    def __post_init__(self) -> None:
        for field, known in (("split", SPLITS), ("kernel", KERNELS)):
            if (value := getattr(self, field)) not in known:
                raise ValueError(f"pitome: {field}={value!r} must be one of {known}; change it.")

    def counts(self, n: int, prefix: int) -> int:
        body, whole = n - prefix, self.split == "closest"
        return n - min(self.r, (body + whole) // 2, max(body - 1, 0))

    def macs(self, n: int, layout: Layout) -> int:
        return (n - layout.prefix) ** 2 * (layout.width // layout.heads)

    def select(self, tokens: Tokens, evidence: Mapping[str, Array], *, key: Any) -> Assign:
        n, prefix, valid = tokens.n, tokens.prefix, tokens.valid
        similar = _among_all(evidence[KEYS.name], prefix)
        energy: dict[str, Any] = {"margin": self.margin, "alpha": self.alpha, "kernel": self.kernel}
        body = None if valid is None else valid[..., prefix:]
        isolated = score_by_energy(similar, valid=body, **energy)
        order, r = rank_tokens(-isolated, valid=body).index, n - self.counts(n, prefix)
        a, b, rest = self.sets(order, r)
        axis = order.ndim - 1
        pairs = gather(gather(similar, a, axis=axis), b[..., None, :], axis=axis + 1)
        front = jnp.concatenate([static_rows(range(prefix), tokens.batch), rest + prefix], -1)
        return match_sets(pairs, a + prefix, b + prefix, r, n, front=front, valid=valid)

    def sets(self, order: Array, r: int) -> tuple[Array, Array, Array]:
        """Who may leave, who takes in, who takes no part, of tokens by falling energy."""
        if self.split == "closest":
            return order[..., ::2], order[..., 1::2], order[..., :0]
        some, rest = order[..., : 2 * r], order[..., 2 * r :]
        if self.split == "halves":
            return some[..., :r], some[..., r:], rest
        return some[..., ::2], some[..., 1::2], rest


def _among_all(metric: Float[Array, "*B N E"], prefix: int) -> Float[Array, "*B P P"]:
    """Cosine similarity of all tokens behind the prefix."""
    body = metric[..., prefix:, :]
    return cosine(body, body)


def merged_share(n: int, ratio: float) -> int:
    """How many of `n` tokens merge, as the official code counts them: floor(n - n * ratio)."""
    return max(0, math.floor(n - n * ratio))


def removals(layout: Layout, keep: float, ratio: float | None) -> list[int]:
    """Tokens to merge per layer, half of those left at most: a share of `ratio` stays in each, or
    one that leaves keep * patches in the end."""
    n = layout.patches
    removed = []
    for target in geometric(n, keep, range(layout.depth)):
        r = max(0, n - target) if ratio is None else merged_share(n, ratio)
        removed.append(max(0, n - layout.rounded(n - min(r, n // 2))))
        n -= removed[-1]
    return removed


@register("pitome", family="merge", site="mid", golden=("vit/pitome",), paper="PiToMe 2024")
def pitome(
    layout: Layout,
    *,
    keep: float = 0.25,
    ratio: float | None = None,
    margin: float = 0.75,
    splits: Sequence[str] | None = None,
    kernel: str = "elu",
    alpha: float = 1.0,
    proportional: bool = True,
) -> Plan:
    """Tokens of large clusters merge, an equal share in every layer; isolated ones are protected.

    keep: what is left after the last layer. ratio: instead, as in the official code, the share that
    stays in each layer. margin: of the first layer, falling to 0 behind the last. splits: by layer,
    'closest' in the first half and 'alternate' in the second by default. Others: see `PiToMe`.
    """
    depth = layout.depth
    early = math.ceil(depth / 2)
    splits = ("closest",) * early + ("alternate",) * (depth - early) if splits is None else splits
    if len(splits) != depth:
        raise ValueError(
            f"pitome: splits={splits} must name one for each of {depth} layers; change splits."
        )
    steps = []
    for i, (r, split) in enumerate(zip(removals(layout, keep, ratio), splits, strict=True)):
        how = (margin * (1 - i / depth), alpha, split, kernel)
        steps += [(Site("mid", i), PiToMe(r, proportional, *how))] * (r > 0)
    return Plan(tuple(steps), name="pitome")
