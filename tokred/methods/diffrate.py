"""DiffRate (Chen et al. 2023): learned rates of pruning, then merging, in every layer.

Official code: OpenGVLab/DiffRate (no licence file).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokred.gates import Rate, min_through
from tokred.maps import Assign, TokenMap, compose, follow
from tokred.methods.registry import register
from tokred.methods.topk import CLASS_ROW
from tokred.nn.routers import RateLogits
from tokred.plan import Ask, Layout, Plan, Reduction, Site, require_module
from tokred.schedule import linear
from tokred.select import keep_top_k, merge_to_nearest, nearest_kept, rank_tokens
from tokred.tokens import Tokens, move


@dataclass(frozen=True)
class DiffRate(Reduction):
    """Sorts tokens by class attention, prunes to `prune_kept`, merges the tail into `merge_kept`.

    packed: both counts are integers (prefix included) and tokens leave. Merged features take the
    plain mean; sizes add up, scaled by cosine similarity.
    soft: all tokens stay, sorted; the counts come from learned logits and act as rank masks with
    straight-through gradients. The twins differ by design: sizes are clamped to >= 1 in the soft
    one, masked tokens still attend to themselves, and its softmax has an epsilon.
    gradient: of `expected_count`: 'official' (both rates feel it, earlier layers do not) or
    'exact' (the chain rule of the minimum).
    """

    prune_kept: int
    merge_kept: int
    patches: int
    granularity: int = 1
    gradient: str = "official"
    asks: ClassVar[tuple[Ask, ...]] = (CLASS_ROW,)
    twins: ClassVar[tuple[str, ...]] = ("packed", "soft")

    def __post_init__(self) -> None:
        if self.gradient not in ("official", "exact"):
            raise ValueError(
                f"DiffRate: gradient={self.gradient!r} must be 'official' or 'exact'; change it."
            )

    def counts(self, n: int, prefix: int) -> int:
        return min(n, self.prune_kept, self.merge_kept)

    def macs(self, n: int, layout: Layout) -> int:
        middle = min(n, self.prune_kept)
        k = min(middle, self.merge_kept)
        return (middle - k) * k * layout.width

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> RateLogits:
        return RateLogits(len(self.rate(0).candidates))

    def rate(self, prefix: int) -> Rate:
        return Rate(self.patches, self.granularity, prefix)

    def expected_count(self, n: Any, prefix: int, aux: Mapping[str, Any]) -> Array:
        kept = (aux["prune_kept"], aux["merge_kept"])
        if self.gradient == "exact":
            return jnp.minimum(jnp.minimum(n, kept[0]), kept[1])
        return min_through(jax.lax.stop_gradient(jnp.asarray(n, jnp.float32)), *kept)

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
    ) -> tuple[Tokens, TokenMap | None, Any, dict[str, Array]]:
        scores = evidence[CLASS_ROW.name]
        if twin == "soft":
            return self._soft(tokens, scores, state, require_module(self, module))
        if self.idle(tokens.n, tokens.prefix):
            return tokens, None, state, {}
        tokens, map_ = self._packed(tokens, scores)
        return tokens, map_, state, {}

    def _packed(self, tokens: Tokens, scores: Array) -> tuple[Tokens, TokenMap]:
        prefix, middle = tokens.prefix, min(tokens.n, self.prune_kept)
        pruned = keep_top_k(scores, middle - prefix, prefix=prefix, valid=tokens.valid)
        tokens = move(tokens, pruned)
        if self.merge_kept >= middle:
            return tokens, pruned
        merged, similar = merge_to_nearest(
            tokens.x, self.merge_kept, prefix=prefix, valid=tokens.valid
        )
        size = merged.apply(tokens.sizes(), "weighted_sum", weight=similar)
        tokens = move(tokens, merged, how="mean").replace(size=size, proportional=True)
        return tokens, compose(pruned, merged)

    def _soft(
        self, tokens: Tokens, scores: Array, state: Any, module: RateLogits
    ) -> tuple[Tokens, TokenMap, Any, dict[str, Array]]:
        prefix, rate = tokens.prefix, self.rate(tokens.prefix)
        prune, merge = module.prune[...], module.merge[...]
        kept_prune, kept_merge = rate.kept(prune), rate.kept(merge)
        sort = rank_tokens(scores, prefix=prefix, valid=tokens.valid)
        tokens = move(tokens, sort)
        mask = jnp.ones(tokens.x.shape[:-1]) if tokens.policy is None else tokens.policy
        alive = jax.lax.stop_gradient(mask).sum(-1)  # [*B], the same in every row
        mask = _tighten(mask, rate.mask(prune, alive), kept_prune < alive)
        middle = jnp.minimum(alive, jax.lax.stop_gradient(kept_prune))
        map_, tokens = _merge_ranks(tokens, jax.lax.stop_gradient(kept_merge), middle)
        mask = _tighten(mask, rate.mask(merge, middle), kept_merge < middle)
        tokens = tokens.replace(policy=mask, proportional=True)
        aux = {"prune_kept": kept_prune, "merge_kept": kept_merge}
        return tokens, compose(sort, map_), state, aux


def _tighten(mask: Array, by: Array, active: Array) -> Array:
    """mask * by in the examples where the rate is active; no gradient to an idle rate."""
    return jnp.where(active[..., None], mask * by, mask)


def _merge_ranks(tokens: Tokens, kept: Array, middle: Array) -> tuple[Assign, Tokens]:
    """Ranks [kept, middle) join the most similar of the ranks before; they stay as masked rows,
    with their features and sizes, which the gradient of the mask weighs."""
    n = tokens.n
    ranks = jnp.arange(n).reshape((1,) * middle.ndim + (-1,))
    best, partner = nearest_kept(tokens.x, kept, prefix=tokens.prefix, valid=tokens.valid)
    leaving = (ranks >= kept) & (ranks < middle[..., None])
    target = jnp.where(leaving, partner, ranks)
    groups = Assign(target, n)
    x = jnp.where(leaving[..., None], tokens.x, groups.apply(tokens.x, "mean"))
    given = jnp.where(leaving, jnp.maximum(tokens.sizes() * best, 1.0), tokens.sizes())
    size = jnp.where(leaving, given, groups.apply(given, "sum"))
    map_ = Assign(jnp.where(ranks < middle[..., None], target, n), n)
    source = follow(tokens.sources(), map_)
    return map_, tokens.replace(x=x, size=size, source=source)


def freeze(modules: Mapping[str, Any], plan: Plan, layout: Layout) -> dict[str, list[int]]:
    """The learned schedule as integers per layer, prefix included: what is saved and exported.

    modules: the model's `reductions`. plan: the plan they were built with. A layer without a
    rate keeps what it gets; counts never grow with depth.
    """
    n = layout.tokens
    rates = {site.layer: (site, r) for site, r in plan.steps if isinstance(r, DiffRate)}
    schedule: dict[str, list[int]] = {"prune": [], "merge": []}
    for layer in range(layout.depth):
        for name in ("prune", "merge"):
            if layer in rates:
                site, reduction = rates[layer]
                logits = getattr(modules[site.name], name)[...]
                n = min(n, reduction.rate(layout.prefix).freeze(logits))
            schedule[name].append(n)
    return schedule


def schedule_macs(
    prune: Sequence[Any],
    merge: Sequence[Any],
    *,
    width: int,
    patches: int,
    patch: int,
    classes: int,
    prefix: int = 1,
    channels: int = 3,
    mlp_ratio: float = 4.0,
    gradient: str = "official",
) -> Float[Array, ""]:
    """MACs of a schedule by DiffRate's own formula, differentiable in the counts.

    Attention of a block sees the tokens that came in, its MLP those that are left; norms,
    biases and softmax are not counted.
    """
    rate = DiffRate(0, 0, patches, gradient=gradient)
    n: Any = jnp.asarray(float(patches + prefix))
    total = n * width * channels * patch**2 + width * classes
    for kept_prune, kept_merge in zip(prune, merge, strict=True):
        total = total + 4 * n * width**2 + 2 * n**2 * width
        kept = {"prune_kept": jnp.asarray(kept_prune, jnp.float32)}
        kept["merge_kept"] = jnp.asarray(kept_merge, jnp.float32)
        n = rate.expected_count(n, prefix, kept)
        total = total + 2 * mlp_ratio * n * width**2
    return total


def presets() -> dict[str, dict[str, list[int]]]:
    """Published schedules by name 'MODEL@GMACs', such as 'deit_s@2.9'."""
    text = resources.files("tokred.methods").joinpath("diffrate_schedules.json").read_text()
    return json.loads(text)


def _schedule(
    layout: Layout, keep: float, prune: Any, merge: Any, preset: str | None
) -> tuple[Sequence[int], Sequence[int]]:
    if preset is not None:
        table = presets()
        if preset not in table:
            raise ValueError(f"method 'diffrate': preset={preset!r} is not one of {sorted(table)}.")
        prune, merge = table[preset]["prune"], table[preset]["merge"]
    if prune is None and merge is None:
        left = linear(layout.patches, keep, range(layout.depth - 1))
        counts = [layout.tokens, *(layout.prefix + k for k in left)]
        # Half of what leaves is pruned, half merged.
        before = [layout.tokens, *counts[:-1]]
        return [(a + b) // 2 for a, b in zip(before, counts, strict=True)], counts
    if prune is None or merge is None or not len(prune) == len(merge) == layout.depth:
        raise ValueError(
            f"method 'diffrate': prune and merge must both hold {layout.depth} counts, one per "
            f"layer; got {prune} and {merge}."
        )
    return prune, merge


@register(
    "diffrate",
    family="prune and merge",
    site="mid",
    learned=True,
    needs=("class token",),
    twins="different",
    golden=(
        "core/diffrate__rate",
        "core/diffrate__merge",
        "core/diffrate__deit",
        "core/diffrate__schedule",
    ),
    paper="DiffRate 2023",
)
def diffrate(
    layout: Layout,
    *,
    keep: float = 0.25,
    prune: Sequence[int] | None = None,
    merge: Sequence[int] | None = None,
    preset: str | None = None,
    granularity: int = 1,
    gradient: str = "official",
) -> Plan:
    """Every layer prunes, then merges, at rates learned through the accuracy and the MACs.

    prune, merge: counts left per layer, prefix included (learned, or `preset` of `presets()`);
    without them equal steps down to `keep`. The soft twin learns them: block 0 stays dense.
    """
    patches = layout.patches
    pairs = enumerate(zip(*_schedule(layout, keep, prune, merge, preset), strict=True))
    steps = [
        (Site("mid", i), DiffRate(int(p), int(m), patches, granularity, gradient))
        for i, (p, m) in pairs
        if i > 0 or min(p, m) < layout.tokens
    ]
    return Plan(tuple(steps), name="diffrate")
