"""Multiply-accumulates of one example, from the counts of a plan alone.

One walk gives the counts and one formula the cost, for the integers of a packed plan and for the
differentiable floats of a rate that is still being learned.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float

from tokred.plan import Ask, Layout, Plan, Reduction, Site, Step
from tokred.report import Report

Number = Any  # int, float or a traced scalar
DENSE = Plan()
# Which of a layer's projections (query, key, value) a piece of evidence reads.
PROJECTIONS = {
    "rows": (0, 1), "column_mean": (0, 1), "probs": (0, 1), "keys": (1,), "values": (2,),
    "qkv": (0, 1, 2),
}  # fmt: skip


@runtime_checkable
class Costed(Protocol):
    """What the config of a model tells of its cost; MACs are of one example."""

    @property
    def depth(self) -> int: ...

    @property
    def layout(self) -> Layout: ...

    def layout_of(self, tokens: int) -> Layout:
        """The layout for another number of tokens."""
        ...

    @property
    def projection_macs(self) -> tuple[int, int, int]:
        """Of one token's query, key and value."""
        ...

    @property
    def pair_macs(self) -> int:
        """Of one query's logits or values with one key, all heads."""
        ...

    def layer_macs(self, projected: Number, queries: Number, keys: Number, mlp: Number) -> Number:
        """Of one layer, at these token counts."""
        ...

    def outer_macs(self, tokens: Number) -> Number:
        """Of all that is no layer, with so many tokens coming out."""
        ...


@runtime_checkable
class Composite(Protocol):
    """The same of a model whose parts have costs of their own."""

    @property
    def layout(self) -> Layout: ...

    def parts(self, plan: Plan, tokens: int | None) -> Mapping[str, tuple[Costed, int | None, int]]:
        """By the part's name: its config, its tokens (None for what it takes), how many times it
        runs. What is outside its layers counts for parts without tokens alone."""
        ...

    def joint_macs(self, plan: Plan, tokens: int | None) -> int:
        """Of all that lies between the parts and behind them."""
        ...


class LayerCost(NamedTuple):
    """MACs of one example in one layer of a part, all times that it runs, and the tokens that pass:
    through the projections, as queries, as keys, through the MLP. layer: None for what lies around
    the layers. reductions: what they compute and the evidence that they read."""

    part: str
    layer: int | None
    projected: int
    queries: int
    keys: int
    mlp: int
    attention_macs: int
    mlp_macs: int
    reduction_macs: int
    outer_macs: int = 0

    @property
    def macs(self) -> int:
        return self.attention_macs + self.mlp_macs + self.reduction_macs + self.outer_macs


def macs(config: Costed | Composite, plan: Plan = DENSE, *, tokens: int | None = None) -> int:
    """Multiply-accumulates of one example: matrix products only, no elementwise work.

    tokens: of the sequence, by default as many as the model takes.

    Raises:
      ValueError: a plan that does not fit the model.
    """
    return sum(row.macs for row in layer_costs(config, plan, tokens=tokens))


def layer_costs(
    config: Costed | Composite, plan: Plan = DENSE, *, tokens: int | None = None
) -> list[LayerCost]:
    """Where the MACs of one example are; arguments and errors as in `macs`."""
    if not isinstance(config, Composite):
        return _layer_costs("", config, plan, tokens)
    rows = []
    for name, (part, n, times) in config.parts(plan, tokens).items():
        own = _layer_costs(name, part, plan.of(name), n, n is None)
        rows += [row._replace(**{f: times * getattr(row, f) for f in COUNTED}) for row in own]
    joint = config.joint_macs(plan, tokens)
    return [*rows, LayerCost("between", None, 0, 0, 0, 0, 0, 0, 0, joint)]


COUNTED = ("attention_macs", "mlp_macs", "reduction_macs", "outer_macs")


def _layer_costs(
    name: str, config: Costed, plan: Plan, tokens: int | None, outer: bool = True
) -> list[LayerCost]:
    layout = config.layout if tokens is None else config.layout_of(tokens)
    walk = _whole(config, plan, layout)
    spent: dict[int | None, int] = defaultdict(int)
    for layer, each in _reductions(config, plan, walk, layout):
        spent[layer] += each
    rows = []
    for i, n in enumerate(walk.layers):
        attention = config.layer_macs(n.projected, n.queries, n.keys, 0)
        mlp = config.layer_macs(n.projected, n.queries, n.keys, n.mlp) - attention
        rows.append(LayerCost(name, i, *n, attention, mlp, round(spent.pop(i, 0))))
    around = config.outer_macs(walk.tokens) if outer else 0
    n = walk.tokens
    return [*rows, LayerCost(name, None, n, n, n, n, 0, 0, round(sum(spent.values())), around)]


def expected_macs(
    config: Costed | Composite, plan: Plan, report: Report, *, tokens: int | None = None
) -> Float[Array, ""] | float:
    """What the packed plan would cost at the rates that a soft run reports.

    Every soft reduction leaves its `expected_count`, differentiable in what `report.aux` holds;
    the others leave the integers of the packed plan, and so does, for the parts behind it, one
    whose tokens go on to another part of the model. What the reductions themselves cost is taken
    at those integers: a constant, a percent or two.

    Raises:
      ValueError: a plan that does not fit the model, or a report of another plan.
    """
    if isinstance(config, Composite):
        packed = plan.with_twin("packed")
        parts = config.parts(packed, tokens).items()
        each = [
            times * _expected(part, plan.of(name), report.parts[name], n, n is None)
            for name, (part, n, times) in parts
        ]
        return sum(each) + 1.0 * config.joint_macs(packed, tokens)
    return _expected(config, plan, report, tokens)


def _expected(
    config: Costed, plan: Plan, report: Report, tokens: int | None, outer: bool = True
) -> Float[Array, ""] | float:
    packed = plan.with_twin("packed")
    layout = config.layout if tokens is None else config.layout_of(tokens)

    def count(site: Site, reduction: Reduction, n: Number) -> Number:
        if plan.twin != "soft":
            return reduction.counts(n, layout.prefix)
        told = _aux(report.aux, site, plan) if "soft" in reduction.twins else {}
        return reduction.expected_count(n, layout.prefix, told)

    expected = _model(config, _walk(config, plan, count, layout), outer)
    costs = _reductions(config, packed, _whole(config, packed, layout), layout)
    return 1.0 * (expected + sum(each for _, each in costs))


def _aux(aux: Mapping[str, Any], site: Site, plan: Plan) -> Mapping[str, Any]:
    if site.name not in aux:
        raise ValueError(
            f"expected_macs: the report has no aux of {site.name!r}, which plan {plan.name!r} "
            "learns; pass the report of a run under this very plan."
        )
    return aux[site.name]


class _Layer(NamedTuple):
    """Counts in one layer: at the projections, queries, keys and MLP."""

    projected: Number
    queries: Number
    keys: Number
    mlp: Number


@dataclass
class _Walk:
    """What a walk through the model meets: layers, reductions and what they store, with n."""

    tokens: Number = 0
    layers: list[_Layer] = field(default_factory=list)
    reductions: list[tuple[Site, Reduction, Number]] = field(default_factory=list)
    stored: list[tuple[int, Ask, Number]] = field(default_factory=list)


def _whole(config: Costed, plan: Plan, layout: Layout) -> _Walk:
    """The walk in whole tokens."""
    plan.counts(layout)

    def count(site: Site, reduction: Reduction, n: int) -> int:
        return reduction.slots(n, layout.prefix, plan.twin)

    return _walk(config, plan, count, layout)


def _walk(config: Costed, plan: Plan, count: Callable[..., Number], layout: Layout) -> _Walk:
    walk = _Walk()

    def passed(steps: Iterable[Step], n: Number) -> Number:
        for site, reduction in steps:
            walk.reductions.append((site, reduction, n))
            n = count(site, reduction, n)
        return n

    def after(kind: str, layer: int | None, n: Number) -> Number:
        return passed(plan.at(kind, layer), n)

    n, outside = after("input", None, layout.tokens), []
    for layer in range(config.depth):
        for step in plan.opening(layer):
            outside.append(n)
            n = passed((step,), n)
        n = after("before", layer, n)
        inner = after("around", layer, n)
        projected = after("around_attention", layer, inner)
        keys = after("keys", layer, projected)
        queries = after("inside", layer, projected)
        walk.stored += [(layer, ask, projected) for ask in plan.stored_at(layer)]
        # Around a branch all tokens come back; inside it, only those that were kept.
        middle = after("mid", layer, inner if _differ(inner, projected) else queries)
        mlp = after("around_mlp", layer, middle)
        walk.layers.append(_Layer(projected, queries, keys, mlp))
        n = n if _differ(n, inner) else after("after", layer, middle)
        for _ in plan.closing(layer):
            n = outside.pop()
    walk.tokens = after("output", None, n)
    return walk


def _differ(a: Number, b: Number) -> bool:
    """Whether two counts differ; learned ones do."""
    return not (isinstance(a, int) and isinstance(b, int) and a == b)


def _model(config: Costed, walk: _Walk, outer: bool) -> Number:
    """The model alone: layers, and what is around them."""
    layers = [config.layer_macs(a.projected, a.queries, a.keys, a.mlp) for a in walk.layers]
    return (config.outer_macs(walk.tokens) if outer else 0) + sum(layers)


def _reductions(
    config: Costed, plan: Plan, walk: _Walk, layout: Layout
) -> Iterator[tuple[int | None, int]]:
    """(layer, MACs) of the reductions that act, and of the evidence they read."""
    for layer, ask, n in walk.stored:
        yield layer, _evidence(config, ask, n, True)
    for site, reduction, n in walk.reductions:
        gates = plan.twin == "soft" and "soft" in reduction.twins
        if gates or not reduction.idle(n, layout.prefix):
            yield site.layer, _reduction(config, site, reduction, n, layout)


def _reduction(config: Costed, site: Site, reduction: Reduction, n: int, layout: Layout) -> int:
    seen = site.kind in ("keys", "inside", "mid")
    asks = [ask for ask in reduction.asks if ask.layer >= 0]
    evidence = [_evidence(config, ask, n, seen and ask.layer == 0) for ask in asks]
    return reduction.macs(n, layout) + sum(evidence)


def _evidence(config: Costed, ask: Ask, n: int, seen: bool) -> int:
    """Evidence about `n` tokens; what the layer has not projected itself is projected for it."""
    read = () if seen else PROJECTIONS.get(ask.kind, ())
    projections = n * sum(config.projection_macs[i] for i in read)
    if ask.kind == "rows" and ask.rows in ("cls", "last"):
        return projections + n * config.pair_macs
    if ask.kind in ("rows", "column_mean"):
        return projections + n * n * (config.pair_macs + config.layout.heads)
    return projections + (n * n * config.pair_macs if ask.kind == "probs" else 0)
