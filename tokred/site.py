"""Places in a model, what may be asked there, and what a plan may know of the model."""

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from tokred.schedule import round_up

LAYER_SITES = (
    "before", "keys", "inside", "mid", "after", "around", "around_attention", "around_mlp"
)  # fmt: skip
AROUND = ("around", "around_attention", "around_mlp")
MODEL_SITES = ("input", "output", "cache", "step", "loss")
EVIDENCE = (
    "rows", "column_mean", "probs", "keys", "values", "qkv", "input", "hidden", "normed", "cached",
    "experts", "given",
)  # fmt: skip
PARTS = ("", "vision", "connector", "decoder")
EXPERT_WEIGHT = "expert_weight"  # in Tokens.extra: weights of the next MLP's experts
ATTENTION = "attention"  # in Tokens.extra: [*B N H N], the probabilities of the next attention


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for error sentences, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, order=True)
class Site:
    """A place in a model: a kind of `LAYER_SITES` with its layer, or one of `MODEL_SITES`.

    until: the last layer of a span that 'around' encloses, each layer with all of its sites; None
    for one layer alone, whose 'before' and 'after' lie outside. part: one of `PARTS`, of a model
    that has several.
    """

    kind: str
    layer: int | None = None
    until: int | None = None
    part: str = ""

    def __post_init__(self) -> None:
        if self.kind not in LAYER_SITES + MODEL_SITES:
            raise ValueError(
                f"Site: {self.kind!r} is no site{nearest(self.kind, LAYER_SITES + MODEL_SITES)}"
            )
        if self.part not in PARTS:
            raise ValueError(
                f"Site: part={self.part!r} must be one of {PARTS}{nearest(self.part, PARTS)}"
            )
        if (self.kind in LAYER_SITES) != (self.layer is not None):
            raise ValueError(
                f"Site {self.kind!r}: layer={self.layer}; only layer sites take a layer."
            )
        if self.until is None:
            return
        if self.kind != "around" or not self.layers:
            raise ValueError(
                f"Site {self.kind!r}: until={self.until} must be a layer from layer={self.layer} "
                "on, at a site 'around'; change until."
            )
        if self.until == self.layer:
            object.__setattr__(self, "until", None)

    @property
    def name(self) -> str:
        words = (self.kind, self.layer, self.until)
        name = "_".join(str(word) for word in words if word is not None)
        return f"{self.part}/{name}" if self.part else name

    @property
    def layers(self) -> range:
        """The layers that the site concerns; none for those of `MODEL_SITES`."""
        if self.layer is None:
            return range(0)
        return range(self.layer, (self.layer if self.until is None else self.until) + 1)


@dataclass(frozen=True)
class Ask:
    """Evidence by name. All but 'probs' are per-token arrays [*B N ...].

    kind: 'rows' attention of chosen queries, their own softmax · 'column_mean' attention received
    · 'probs' all of [*B H N N], paid visibly · 'keys', 'values', 'qkv' projections · 'input' the
    layer's input · 'hidden' the current features · 'normed' those as the branch at this site
    normalises them · 'cached' how many entries the layer's cache holds already, [*B N]
    · 'experts' the logits of a mixture of experts' router · 'given' what `Call.given` holds under
    the name `rows`, such as a text that a connector reads.
    rows: 'cls' | 'last' | the name of a query mask in `Tokens.extra`.
    heads: 'mean' | 'all' (then a head axis follows the token axis).
    layer: 0 this layer · -d stored d layers ago and moved since · +d a later layer's projections
    of the current tokens.
    """

    kind: str
    rows: str = "cls"
    heads: str = "mean"
    layer: int = 0

    def __post_init__(self) -> None:
        if self.kind not in EVIDENCE:
            raise ValueError(
                f"Ask: kind={self.kind!r} is no evidence{nearest(self.kind, EVIDENCE)}"
            )
        if self.heads not in ("mean", "all"):
            raise ValueError(f"Ask: heads={self.heads!r} must be 'mean' or 'all'.")

    @property
    def name(self) -> str:
        rows = f"_{self.rows}" if self.kind in ("rows", "given") else ""
        heads = "" if self.heads == "mean" else f"_{self.heads}"
        layer = f"@{self.layer:+d}" if self.layer else ""
        return f"{self.kind}{rows}{heads}{layer}"


@dataclass(frozen=True)
class Layout:
    """What a plan may know of a model, all static: tokens includes the prefix. images: how many
    images there are among the tokens, and of how many tokens each. part: of a larger model, in
    which the plans made for this layout lie. round_to: the tile edge of the hardware, to whose
    multiples schedules raise their counts."""

    depth: int
    tokens: int
    prefix: int
    grid: tuple[int, int]
    class_token: bool
    width: int
    heads: int
    images: tuple[int, int] = (0, 0)
    part: str = ""
    round_to: int = 1

    @classmethod
    def of_sequence(cls, depth: int, tokens: int, width: int, heads: int) -> "Layout":
        """Of a model that reads so many tokens one after another, without any in front."""
        return cls(depth, tokens, 0, (1, tokens), False, width, heads)

    @property
    def alone(self) -> "Layout":
        """The same as of a model of its own, for `Plan.of` this part."""
        return dataclasses.replace(self, part="")

    @property
    def patches(self) -> int:
        return self.tokens - self.prefix

    def rounded(self, kept: int) -> int:
        """As many tokens behind the prefix, or a few more that fill the tile; at most all."""
        filled = round_up(self.prefix + kept, self.round_to) - self.prefix
        return min(filled, max(kept, self.patches))
