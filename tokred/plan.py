"""What acts where: reductions and plans.

Models take a Plan and know no method; methods know tokens, evidence and maps, and know no model.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Array, PRNGKeyArray

from tokred.maps import TokenMap
from tokred.site import (
    AROUND,
    ATTENTION,
    EVIDENCE,
    EXPERT_WEIGHT,
    LAYER_SITES,
    MODEL_SITES,
    PARTS,
    Ask,
    Layout,
    Site,
    nearest,
)
from tokred.tokens import Tokens, move

__all__ = [
    "AROUND",
    "ATTENTION",
    "EVIDENCE",
    "EXPERT_WEIGHT",
    "LAYER_SITES",
    "MODEL_SITES",
    "PARTS",
    "TWINS",
    "Ask",
    "LayerCount",
    "Layout",
    "Plan",
    "Reduction",
    "Site",
    "Step",
    "nearest",
    "require_class_token",
    "require_module",
]  # fmt: skip
TWINS = ("packed", "soft", "causal")


@dataclass(frozen=True)
class Reduction:
    """Base of all methods: frozen hyper-parameters and a selection.

    A training-free method defines `counts` and `select`; `move` only where features do not go
    the default way. A learned one also defines `build` and `__call__` with its twins.

    twins: the forms that exist, see `Plan`; in any but the packed one all tokens stay in their
    slots. Under a twin that a reduction lacks it acts packed. grows: whether it may add tokens.
    joins: of how many images, tokens [*B I N D], it makes one.
    """

    asks: ClassVar[tuple[Ask, ...]] = ()
    twins: ClassVar[tuple[str, ...]] = ("packed",)
    grows: ClassVar[bool] = False

    @property
    def joins(self) -> int:
        return 1

    def counts(self, n: int, prefix: int) -> int:
        """Tokens out for `n` tokens in, prefix included in both."""
        raise NotImplementedError

    def slots(self, n: int, prefix: int, twin: str) -> int:
        """Slots out for `n` slots in under a twin."""
        return n if twin != "packed" and twin in self.twins else self.counts(n, prefix)

    def idle(self, n: int, prefix: int) -> bool:
        """Whether nothing happens to `n` tokens: then the input itself is returned."""
        return self.counts(n, prefix) == n

    def select(
        self, tokens: Tokens, evidence: Mapping[str, Array], *, key: PRNGKeyArray | None
    ) -> TokenMap:
        """The map from N to counts(N) tokens."""
        raise NotImplementedError

    def move(self, tokens: Tokens, map_: TokenMap, evidence: Mapping[str, Array]) -> Tokens:
        """All of `tokens` through the map."""
        return move(tokens, map_)

    def init(self) -> Any:
        """Running state at step 0; None for most."""
        return None

    def build(self, width: int, heads: int, rngs: Any) -> Any:
        """The module with this reduction's parameters; None if it learns nothing."""
        return None

    @property
    def decides(self) -> bool:
        """Whether a token can decide alone, as the causal twin asks of it."""
        return "causal" in self.twins

    def cached(self, length: int) -> int:
        """Slots that the cache of this layer needs for a sequence of `length` tokens."""
        return length

    def out_width(self, width: int) -> int:
        """D of the tokens behind this reduction; a module, if any, is built for `width`."""
        return width

    def module_name(self, site: Site) -> str:
        """Where the module hangs in the model; reductions that name one place share one module."""
        return site.name

    def macs(self, n: int, layout: Layout) -> int:
        """Multiply-accumulates of the reduction itself, per example."""
        return 0

    def expected_count(
        self, n: Array | float, prefix: int, aux: Mapping[str, Any]
    ) -> Array | float:
        """The soft twin's count after this site, differentiable where the rate is learned."""
        return self.counts(int(n), prefix)

    def __call__(
        self,
        tokens: Tokens,
        evidence: Mapping[str, Array],
        state: Any = None,
        *,
        module: Any = None,
        key: PRNGKeyArray | None = None,
        train: bool = False,
        twin: str = "packed",
    ) -> tuple[Tokens, TokenMap | None, Any, dict[str, Array]]:
        """(tokens, map or None for the identity, state, auxiliary outputs).

        Nothing removed returns the input itself.
        """
        if self.idle(tokens.n, tokens.prefix):
            return tokens, None, state, {}
        map_ = self.select(tokens, evidence, key=key)
        return self.move(tokens, map_, evidence), map_, state, {}


Step = tuple[Site, Reduction]


class LayerCount(NamedTuple):
    """Token counts in one layer: at the queries, keys, MLP and after the layer, where spans that
    end with it have put their tokens back."""

    queries: int
    keys: int
    mlp: int
    out: int


@dataclass(frozen=True)
class Plan:
    """Frozen and hashable: (site, reduction) pairs in the order of action, and a twin.

    twin: 'packed' tokens leave · 'soft' tokens stay, gates or masks act · 'causal' tokens stay and
    each decides alone, without those that follow: for decoding step by step.
    """

    steps: tuple[Step, ...] = ()
    twin: str = "packed"
    name: str = "dense"

    def __post_init__(self) -> None:
        if self.twin not in TWINS:
            raise ValueError(f"Plan: twin={self.twin!r} must be one of {TWINS}; change twin.")
        for (a, _), (b, _) in itertools.combinations(self.spans, 2):
            one, two = a.layers, b.layers
            if a.part != b.part:
                continue
            if one == two or one.start < two.start < one.stop < two.stop:
                raise ValueError(
                    f"Plan {self.name!r}: spans {a.name} and {b.name} overlap; put one inside the "
                    "other, or side by side."
                )

    def at(self, kind: str, layer: int | None = None) -> tuple[Step, ...]:
        return self.at_site(Site(kind, layer))

    def at_site(self, site: Site) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step[0] == site)

    def of_layer(self, layer: int) -> tuple[Step, ...]:
        """What happens at the layer's own sites."""
        return tuple(s for s in self.steps if s[0].layer == layer and s[0].until is None)

    @property
    def spans(self) -> tuple[Step, ...]:
        """What stands around several layers, the outer before the inner."""
        several = (step for step in self.steps if step[0].until is not None)
        return tuple(sorted(several, key=lambda s: (s[0].layers.start, -s[0].layers.stop)))

    def enclosing(self, layer: int) -> tuple[Step, ...]:
        """The spans around this layer, the outer before the inner."""
        return tuple(step for step in self.spans if layer in step[0].layers)

    def opening(self, layer: int) -> tuple[Step, ...]:
        """Those that begin with it."""
        return tuple(step for step in self.spans if step[0].layer == layer)

    def closing(self, layer: int) -> tuple[Step, ...]:
        """Those that end with it."""
        return tuple(step for step in self.spans if step[0].until == layer)

    def touches(self, layer: int) -> bool:
        """Whether anything happens at, around, or is stored by, this layer."""
        return any(layer in site.layers for site, _ in self.steps) or bool(self.stored_at(layer))

    def stored_at(self, layer: int) -> tuple[Ask, ...]:
        """Evidence of this layer that later layers ask for."""
        asks = {
            ask
            for site, reduction in self.steps
            for ask in reduction.asks
            if ask.layer < 0 and site.layer is not None and site.layer + ask.layer == layer
        }
        return tuple(sorted(asks, key=lambda ask: ask.name))

    def with_twin(self, twin: str) -> "Plan":
        return dataclasses.replace(self, twin=twin)

    def within(self, part: str) -> "Plan":
        """The same in one part of a larger model; what names a part already stays there."""
        place = lambda site: site if site.part else dataclasses.replace(site, part=part)  # noqa: E731
        return dataclasses.replace(self, steps=tuple((place(site), r) for site, r in self.steps))

    def of(self, part: str) -> "Plan":
        """What happens in one part, as a plan of that part alone."""
        mine = (step for step in self.steps if step[0].part == part)
        steps = tuple((dataclasses.replace(site, part=""), r) for site, r in mine)
        return dataclasses.replace(self, steps=steps)

    def __add__(self, other: "Plan") -> "Plan":
        """Both, one after the other where they share a site, under the twin of the first."""
        name = "+".join(p.name for p in (self, other) if p.steps) or self.name
        return dataclasses.replace(self, steps=self.steps + other.steps, name=name)

    def build(self, layout: Layout, rngs: Any) -> dict[str, Any]:
        """Modules of the learned reductions, by their names, each for the width that it meets."""
        built, width = {}, layout.width
        for site, reduction in self.steps:
            name = reduction.module_name(site)
            if name not in built:
                built[name] = reduction.build(width, layout.heads, rngs)
            width = reduction.out_width(width)
        return {name: module for name, module in built.items() if module is not None}

    def out_width(self, width: int) -> int:
        """D of the tokens behind the whole plan."""
        for _, reduction in self.steps:
            width = reduction.out_width(width)
        return width

    def init(self) -> dict[str, Any]:
        """Running states of the reductions at step 0, by site name."""
        states = {site.name: reduction.init() for site, reduction in self.steps}
        return {name: state for name, state in states.items() if state is not None}

    def counts(self, layout: Layout) -> tuple[LayerCount, ...]:
        """Token counts per layer, checked against the model.

        Raises:
          ValueError: a layer that the model lacks, a count that is 0 or exceeds what is left,
            tokens that leave within a span, or evidence that the model cannot give.
        """
        if layout.part:
            return self.of(layout.part).counts(layout.alone)
        self.check(layout)
        n = self._after(self.at("input"), layout.tokens, layout)
        rows, outside = [], []
        for layer in range(layout.depth):
            for step in self.opening(layer):
                outside.append((n, self._after((step,), n, layout)))
                n = outside[-1][1]
            row = self._layer_count(layer, n, layout)
            n = row.out
            for site, _ in self.closing(layer):
                before, entered = outside.pop()
                self._check_return(site, entered, n)
                n = before
            rows.append(row._replace(out=n))
        return tuple(rows)

    def _check_return(self, site: Site, entered: int, left: int) -> None:
        if entered != left:
            raise ValueError(
                f"Plan {self.name!r}: {entered} tokens enter the span {site.name} and {left} come "
                "out, so that they cannot be put back; remove none within it."
            )

    def check(self, layout: Layout) -> None:
        """Raises what `counts` raises for layers and evidence."""
        for site, reduction in self.steps:
            if site.part:
                raise ValueError(
                    f"Plan {self.name!r}: site {site.name} lies in a part that this model does not "
                    f"have; give it plan.of({site.part!r})."
                )
            if site.layer is not None and not 0 <= site.layer < site.layers.stop <= layout.depth:
                raise ValueError(
                    f"Plan {self.name!r}: site {site.name} lies outside a model of {layout.depth} "
                    f"layers; shorten the schedule to layers 0..{layout.depth - 1}."
                )
            if any(a.kind == "rows" and a.rows == "cls" for a in reduction.asks):
                require_class_token(self.name, layout)

    def _layer_count(self, layer: int, n: int, layout: Layout) -> LayerCount:
        after = lambda kind, n: self._after(self.at(kind, layer), n, layout)  # noqa: E731
        n = after("before", n)
        inner = after("around", n)
        attended = after("around_attention", inner)
        keys = after("keys", attended)
        queries = after("inside", attended)
        # Around a branch all tokens come back; inside it, only those that were kept.
        body = inner if attended != inner else queries
        middle = after("mid", body)
        mlp = after("around_mlp", middle)
        out = n if inner != n else after("after", middle)
        return LayerCount(queries, keys, mlp, out)

    def _after(self, steps: tuple[Step, ...], n: int, layout: Layout) -> int:
        for site, reduction in steps:
            k = reduction.slots(n, layout.prefix, self.twin)
            lowest = 0 if site.kind in AROUND else layout.prefix + 1  # around, all come back
            if not lowest <= k <= (max(k, n) if reduction.grows else n):
                raise ValueError(
                    f"Plan {self.name!r}: {type(reduction).__name__} at {site.name} would leave "
                    f"{k} of {n} tokens ({layout.prefix} protected); give it a count in "
                    f"[{lowest}, {n}]."
                )
            n = k
        return n


def require_class_token(name: str, layout: Layout) -> None:
    """Raises ValueError where a method reads the class token and the model has none."""
    if not layout.class_token:
        raise ValueError(
            f"{name}: needs a class token, which this model lacks; set class_token=True or choose "
            "a method without that need (see `python -m tokred methods`)."
        )


def require_module(reduction: Reduction, module: Any) -> Any:
    """The module of a learned reduction. Raises ValueError where the model was built without it."""
    if module is None:
        raise ValueError(
            f"{type(reduction).__name__}: the model has no module for this site; build it with "
            "plan=, or attach the plan's modules through Call(modules=...)."
        )
    return module
