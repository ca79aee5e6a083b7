"""What acts where: sites, reductions and plans.

Models take a Plan and know no method; methods know tokens, evidence and maps, and know no model.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Array, PRNGKeyArray

from tokred.maps import TokenMap
from tokred.tokens import Tokens, move

LAYER_SITES = (
    "before", "keys", "inside", "mid", "after", "around", "around_attention", "around_mlp"
)  # fmt: skip
AROUND = ("around", "around_attention", "around_mlp")
MODEL_SITES = ("input", "output", "cache", "step", "loss")
EVIDENCE = (
    "rows", "column_mean", "probs", "keys", "values", "qkv", "input", "hidden", "normed", "cached",
    "experts",
)  # fmt: skip
EXPERT_WEIGHT = "expert_weight"  # in Tokens.extra: weights of the next MLP's experts
TWINS = ("packed", "soft", "causal")


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for error sentences, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, order=True)
class Site:
    """A place in a model: a kind of `LAYER_SITES` with its layer, or one of `MODEL_SITES`.

    until: the last layer of a span that 'around' encloses, each layer with all of its sites; None
    for one layer alone, whose 'before' and 'after' lie outside.
    """

    kind: str
    layer: int | None = None
    until: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in LAYER_SITES + MODEL_SITES:
            raise ValueError(
                f"Site: {self.kind!r} is no site{nearest(self.kind, LAYER_SITES + MODEL_SITES)}"
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
        parts = (self.kind, self.layer, self.until)
        return "_".join(str(part) for part in parts if part is not None)

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
    · 'experts' the logits of a mixture of experts' router.
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
        rows = f"_{self.rows}" if self.kind == "rows" else ""
        heads = "" if self.heads == "mean" else f"_{self.heads}"
        layer = f"@{self.layer:+d}" if self.layer else ""
        return f"{self.kind}{rows}{heads}{layer}"


@dataclass(frozen=True)
class Layout:
    """What a plan may know of a model, all static: tokens includes the prefix."""

    depth: int
    tokens: int
    prefix: int
    grid: tuple[int, int]
    class_token: bool
    width: int
    heads: int

    @classmethod
    def of_sequence(cls, depth: int, tokens: int, width: int, heads: int) -> "Layout":
        """Of a model that reads so many tokens one after another, without any in front."""
        return cls(depth, tokens, 0, (1, tokens), False, width, heads)


@dataclass(frozen=True)
class Reduction:
    """Base of all methods: frozen hyper-parameters and a selection.

    A training-free method defines `counts` and `select`; `move` only where features do not go
    the default way. A learned one also defines `build` and `__call__` with its twins.

    twins: the forms that exist, see `Plan`; in any but the packed one all tokens stay in their
    slots. Under a twin that a reduction lacks it acts packed.
    """

    asks: ClassVar[tuple[Ask, ...]] = ()
    twins: ClassVar[tuple[str, ...]] = ("packed",)

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

    def build(self, layout: Layout, rngs: Any) -> dict[str, Any]:
        """Modules of the learned reductions, by their names."""
        named = {r.module_name(site): r for site, r in self.steps}
        built = {name: r.build(layout.width, layout.heads, rngs) for name, r in named.items()}
        return {name: module for name, module in built.items() if module is not None}

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
            if not lowest <= k <= n:
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
