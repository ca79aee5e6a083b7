"""ATS, adaptive token sampling (Fayyaz et al. 2022, arXiv 2111.15667): quantiles of what each
token gives the class token choose who stays, so that easy images keep fewer tokens.

Official code: adaptivetokensampling/ATS (Apache-2.0); a port: JoakimHaurum/TokenReduction (MIT).
They are two methods. rule='official': the class token's attention times the length of all heads'
values as one vector; tokens sorted, the lowest first; cumulated shares stretched to [0, 1], so that
the lowest token never stays; as many quantiles in every layer as the image had patches, all removal
being that several fall on one token. rule='paper', the paper's equations and the port's: the sum
over heads of attention times the length of its value; tokens in their order; quantiles at
1/2K, 3/2K, ... The port leaves out the last of these for most K, and lets masked tokens be met.
Unlike both: static slots; and padding changes nothing, where in the official code an empty slot of
an earlier layer makes the lowest token eligible again (empty_counts=True).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array

from tokred.maps import Keep
from tokred.methods.registry import register
from tokred.plan import Ask, Layout, Plan, Reduction, Site
from tokred.schedule import linear
from tokred.score import score_by_class_value
from tokred.select import as_shares, keep_quantiles
from tokred.tokens import Tokens, move

CLASS_ROWS = Ask("rows", rows="cls", heads="all")
VALUES = Ask("values", heads="all")
RULES = ("official", "paper")


def quantiles_of(rule: str, samples: int) -> tuple[float, ...]:
    """So many in [0, 1]: from 0 to 1 under 'official' (1 alone), the centres of equal parts under
    'paper'."""
    if rule == "paper":
        return tuple((2 * i + 1) / (2 * samples) for i in range(samples))
    return tuple(i / (samples - 1) for i in range(samples)) if samples > 1 else (1.0,)


@dataclass(frozen=True)
class ATS(Reduction):
    """The tokens that quantiles of a score fall on, inside attention: their queries look at the
    keys of all tokens.

    capacity: slots for tokens behind the prefix; an image that needs fewer leaves the rest invalid,
    of more the highest scores fit (aux 'overflow' [*B]). quantiles: in [0, 1]. rule: one of
    `RULES`. empty_counts: see `select.nearest_quantiles`. All fields are static.
    Gradient: to what stays, none through the choice.
    """

    capacity: int
    quantiles: tuple[float, ...]
    rule: str = "official"
    empty_counts: bool = False
    asks: ClassVar[tuple[Ask, ...]] = (CLASS_ROWS, VALUES)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"ats: rule={self.rule!r} must be one of {RULES}; change rule.")

    def counts(self, n: int, prefix: int) -> int:
        return min(n, prefix + self.capacity)

    def idle(self, n: int, prefix: int) -> bool:
        return False  # quantiles fall where they fall

    def shares(self, tokens: Tokens, evidence: Mapping[str, Array]) -> Array:
        """The distribution over tokens that quantiles are taken of."""
        official = self.rule == "official"
        rows, values = evidence[CLASS_ROWS.name], evidence[VALUES.name]
        scores = score_by_class_value(rows, values, joint=official)
        eps = 0.0 if official else 1e-6
        return as_shares(scores, prefix=tokens.prefix, valid=tokens.valid, eps=eps)

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
    ) -> tuple[Tokens, Keep, Any, dict[str, Array]]:
        map_, overflow = keep_quantiles(
            self.shares(tokens, evidence),
            self.quantiles,
            self.counts(tokens.n, tokens.prefix) - tokens.prefix,
            prefix=tokens.prefix,
            valid=tokens.valid,
            ascending=self.rule == "official",
            empty_counts=self.empty_counts,
        )
        return move(tokens, map_), map_, state, {"overflow": overflow}


@register(
    "ats",
    family="prune",
    site="inside",
    needs=("class token",),
    count="data-dependent",
    paper="ATS 2022",
    golden=("vit/ats_official", "vit/ats_block"),
)
def ats(
    layout: Layout,
    *,
    keep: float = 0.4,
    layers: Sequence[int] | None = None,
    samples: int | None = None,
    rule: str = "official",
    empty_counts: bool = False,
) -> Plan:
    """Quantiles of class attention times value length choose tokens, fewer for easy images.

    keep: slots after the last of these layers, as a share of the patches; they fall linearly.
    layers: default from a quarter of the depth on. samples: quantiles in each layer, default as
    many as slots, so that none overflows; the official code has as many as patches, with keep=1.
    Other options: see `ATS`. With keep=1 and no samples nothing leaves.
    """
    patches = layout.patches
    if samples is not None and samples < 1:
        raise ValueError(f"ats: samples={samples} must be at least 1; raise samples.")
    layers = range(max(1, layout.depth // 4), layout.depth) if layers is None else layers
    slots = tuple(map(layout.rounded, linear(patches, keep, layers)))
    steps = tuple(
        (Site("inside", i), ATS(k, quantiles_of(rule, samples or k), rule, empty_counts))
        for i, k in zip(layers, slots, strict=True)
        if samples is not None or k < patches
    )
    return Plan(steps, name="ats")
