"""Multiply-accumulates of one image, from the counts of a plan alone.

One walk gives the counts and one formula the cost, for the integers of a packed plan and for the
differentiable floats of a rate that is still being learned.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Array, Float

from tokred.models.vit import ViTConfig
from tokred.plan import Ask, Plan, Reduction, Site
from tokred.report import Report

Number = Any  # int, float or a traced scalar
DENSE = Plan()
# Which of a layer's three projections a piece of evidence reads.
PROJECTIONS = {"rows": 2, "column_mean": 2, "probs": 2, "keys": 1, "values": 1, "qkv": 3}


def macs(config: ViTConfig, plan: Plan = DENSE) -> int:
    """Multiply-accumulates of one image: matrix products only, no elementwise work.

    Raises:
      ValueError: a plan that does not fit the model.
    """
    walk = _whole(config, plan)
    return round(_model(config, walk) + _reductions(config, plan, walk))


def expected_macs(config: ViTConfig, plan: Plan, report: Report) -> Float[Array, ""] | float:
    """What the packed plan would cost at the rates that a soft run reports.

    Every soft reduction leaves its `expected_count`, differentiable in what `report.aux` holds;
    the others leave the integers of the plan. What the reductions themselves cost is taken at
    those integers: a constant, a percent or two.

    Raises:
      ValueError: a plan that does not fit the model, or a report of another plan.
    """
    packed = plan.with_twin("packed")

    def count(site: Site, reduction: Reduction, n: Number) -> Number:
        if plan.twin != "soft" or not reduction.soft:
            return reduction.counts(n, config.layout.prefix)
        return reduction.expected_count(n, config.layout.prefix, _aux(report.aux, site, plan))

    expected = _model(config, _walk(config, plan, count))
    return 1.0 * (expected + _reductions(config, packed, _whole(config, packed)))


def _aux(aux: Mapping[str, Mapping[str, Array]], site: Site, plan: Plan) -> Mapping[str, Array]:
    if site.name not in aux:
        raise ValueError(
            f"expected_macs: the report has no aux of {site.name!r}, which plan {plan.name!r} "
            "learns; pass the report of a run under this very plan."
        )
    return aux[site.name]


@dataclass(frozen=True)
class _Layer:
    """Counts in one layer: at the projections, queries, keys and MLP."""

    projected: Number
    queries: Number
    keys: Number
    mlp: Number


@dataclass
class _Walk:
    """What a walk through the model meets: layers, reductions and what they store, with n."""

    layers: list[_Layer] = field(default_factory=list)
    reductions: list[tuple[Site, Reduction, Number]] = field(default_factory=list)
    stored: list[tuple[Ask, Number]] = field(default_factory=list)


def _whole(config: ViTConfig, plan: Plan) -> _Walk:
    """The walk in whole tokens."""
    plan.counts(config.layout)

    def count(site: Site, reduction: Reduction, n: int) -> int:
        stays = plan.twin == "soft" and reduction.soft
        return n if stays else reduction.counts(n, config.layout.prefix)

    return _walk(config, plan, count)


def _walk(config: ViTConfig, plan: Plan, count: Callable[..., Number]) -> _Walk:
    walk = _Walk()

    def after(kind: str, layer: int | None, n: Number) -> Number:
        for site, reduction in plan.at(kind, layer):
            walk.reductions.append((site, reduction, n))
            n = count(site, reduction, n)
        return n

    n = after("input", None, config.layout.tokens)
    for layer in range(config.depth):
        n = after("before", layer, n)
        inner = after("around", layer, n)
        projected = after("around_attention", layer, inner)
        keys = after("keys", layer, projected)
        queries = after("inside", layer, projected)
        walk.stored += [(ask, projected) for ask in plan.stored_at(layer)]
        # Around a branch all tokens come back; inside it, only those that were kept.
        middle = after("mid", layer, inner if _differ(inner, projected) else queries)
        mlp = after("around_mlp", layer, middle)
        walk.layers.append(_Layer(projected, queries, keys, mlp))
        n = n if _differ(n, inner) else after("after", layer, middle)
    after("output", None, n)
    return walk


def _differ(a: Number, b: Number) -> bool:
    """Whether two counts differ; learned ones do."""
    return not (isinstance(a, int) and isinstance(b, int) and a == b)


def _model(config: ViTConfig, walk: _Walk) -> Number:
    """The model alone: embedding, layers, head."""
    ends = _embedding(config) + config.width * config.classes
    return ends + sum(_layer(config, layer) for layer in walk.layers)


def _embedding(config: ViTConfig) -> int:
    (h, w), (a, b) = config.grid, config.patch
    a, b = (a, b) if config.patch_kernel is None else (config.patch_kernel,) * 2
    return h * w * a * b * config.channels * config.width


def _layer(config: ViTConfig, at: _Layer) -> Number:
    width = config.width
    projections = (3 * at.projected + at.queries) * width**2
    mlp = 2 * at.mlp * width * int(width * config.mlp_ratio)
    return projections + 2 * at.queries * at.keys * width + mlp


def _reductions(config: ViTConfig, plan: Plan, walk: _Walk) -> int:
    """The reductions that act, and the evidence they read."""
    total = sum(_evidence(config, ask, n, True) for ask, n in walk.stored)
    for site, reduction, n in walk.reductions:
        gates = plan.twin == "soft" and reduction.soft
        if gates or not reduction.idle(n, config.layout.prefix):
            total += _reduction(config, site, reduction, n)
    return total


def _reduction(config: ViTConfig, site: Site, reduction: Reduction, n: int) -> int:
    seen = site.kind in ("keys", "inside", "mid")
    asks = [ask for ask in reduction.asks if ask.layer >= 0]
    evidence = [_evidence(config, ask, n, seen and ask.layer == 0) for ask in asks]
    return reduction.macs(n, config.layout) + sum(evidence)


def _evidence(config: ViTConfig, ask: Ask, n: int, seen: bool) -> int:
    """Evidence about `n` tokens; what the layer has not projected itself is projected for it."""
    width, heads = config.width, config.heads
    projections = 0 if seen else PROJECTIONS.get(ask.kind, 0) * n * width**2
    if ask.kind == "rows" and ask.rows in ("cls", "last"):
        return projections + n * width
    if ask.kind in ("rows", "column_mean"):
        return projections + n * n * (width + heads)
    return projections + (n * n * width if ask.kind == "probs" else 0)
