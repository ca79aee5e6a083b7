"""The time of decoding step by step, at a share of layers entered that is set, not learned."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tokred.cache import KVCache, cache_reduction
from tokred.cost.bench import Candidate, Row, split, time_rows
from tokred.cost.compiled import Compiled, compile_cost
from tokred.cost.timing import Rounds
from tokred.maps import Keep
from tokred.models import Decoder
from tokred.plan import AROUND, Ask, Layout, Plan, Reduction, Site
from tokred.report import Call
from tokred.tokens import move

PER_TOKEN = ("ms", "ms_low", "ms_high")
Models = Mapping[str, tuple[Decoder, Plan]]


@dataclass(frozen=True)
class Drawn(Reduction):
    """A reduction whose causal decisions are draws: each token enters with probability `share`.

    All that `inner` computes for its own decisions is computed still, and costs its time.
    """

    inner: Reduction
    share: float

    @property
    def asks(self) -> tuple[Ask, ...]:  # type: ignore[override]
        return self.inner.asks

    def counts(self, n: int, prefix: int) -> int:
        return self.inner.counts(n, prefix)

    def slots(self, n: int, prefix: int, twin: str) -> int:
        return self.inner.slots(n, prefix, twin)

    def cached(self, length: int) -> int:
        return self.inner.cached(length)

    def module_name(self, site: Site) -> str:
        return self.inner.module_name(site)

    def build(self, width: int, heads: int, rngs: nnx.Rngs) -> Any:
        return self.inner.build(width, heads, rngs)

    def macs(self, n: int, layout: Layout) -> int:
        return self.inner.macs(n, layout)

    def __call__(self, tokens, evidence, state=None, *, key: Any = None, **how):
        reduced, map_, state, aux = self.inner(tokens, evidence, state, key=key, **how)
        if not isinstance(map_, Keep) or map_.k != map_.n:
            return reduced, map_, state, aux
        draws = jax.random.bernoulli(key, self.share, map_.index.shape)
        map_ = dataclasses.replace(map_, valid=draws)
        moved = move(tokens, map_)
        reduced = reduced.replace(valid=moved.valid, position=moved.position, source=moved.source)
        return reduced, map_, state, aux | {"entered": draws}


def drawn(plan: Plan, share: float) -> Plan:
    """The causal twin of a plan, tokens entering layers by chance."""
    steps = [
        (site, Drawn(r, share) if site.kind in AROUND and r.decides else r)
        for site, r in plan.steps
    ]
    return dataclasses.replace(plan, steps=tuple(steps), twin="causal")


def decode_rows(
    models: Models,
    tokens: int,
    batch: int,
    steps: int,
    share: float,
    key: Array,
    rounds: int | Rounds,
) -> list[Row]:
    """Rows of the passes 'decode' and 'decode, skip', see `bench_decoder`."""
    runs = {}
    for name, (model, plan) in models.items():
        routed = any(site.kind in AROUND for site, _ in plan.steps)
        for skip in (False, True) if routed else (False,):
            runs[name, skip] = Decoding.make(model, plan, tokens, batch, steps, share, key, skip)
    times = time_rows({n: Candidate(run.cost, run) for n, run in runs.items()}, rounds, warmup=1)
    return [
        {
            "pass": "decode, skip" if skip else "decode",
            "method": name,
            "macs": token_macs(*models[name], runs[name, skip].shares, tokens),
            **row,
            **{field: row[field] / steps for field in PER_TOKEN},
            **runs[name, skip].facts(),
        }
        for (name, skip), row in times.items()
    ]


class Decoding:
    """A compiled run of `steps` tokens; the cache is written in place, call after call.

    shares: of the tokens that entered, by site, in the last call.
    """

    def __init__(self, cost: Compiled, args: tuple[Any, ...], cache: KVCache):
        self.cost, self.args, self.cache = cost, args, cache
        self.shares: dict[str, float] = {}

    @classmethod
    def make(
        cls, model: Decoder, plan: Plan, tokens: int, batch: int, steps: int, share: float,
        key: Array, skip: bool,
    ) -> "Decoding":  # fmt: skip
        plan = drawn(plan, share)
        cache = model.make_cache(batch, tokens, plan=plan, prompt=tokens - steps)
        f, params, rest = decode_steps(model, plan, tokens, steps, share, skip)
        cost = compile_cost(f, cache, params, rest, key, donate=(0,))
        return cls(cost, (params, rest, key), cache)

    def __call__(self) -> Array:
        self.cache, ids, entered = self.cost.run(self.cache, *self.args)
        self.shares = {site: float(mean) for site, mean in entered.items()}
        return ids

    def facts(self) -> dict[str, Any]:
        """share, cache_bytes and used_bytes."""
        held = sum(int(c.length.sum()) for c in self.cache.layers)
        slots = sum(c.position.size for c in self.cache.layers)
        shares = self.shares.values()
        return {
            "share": sum(shares) / len(shares) if shares else None,
            "cache_bytes": self.cache.nbytes(),
            "used_bytes": self.cache.nbytes() * held // slots,
        }


def decode_steps(
    model: Decoder, plan: Plan, tokens: int, steps: int, share: float, skip: bool
) -> tuple[Callable[..., Any], Any, Any]:
    """(f, params, rest): f(cache, params, rest, key) reads the likeliest token `steps` times and
    gives (cache, ids [steps B], by site the share of tokens that entered)."""
    merge, params, rest = split(model, plan)
    reduction, depth, count = cache_reduction(plan), model.config.depth, tokens - steps
    held = [reduction.held(count, layer, depth) for layer in range(depth)]
    entries = {
        layer: share
        for site, r in plan.steps
        if isinstance(r, Drawn) and site.kind != "around_mlp"
        for layer in site.layers
    }

    def f(cache: KVCache, params: Any, rest: Any, key: Array) -> Any:
        model, modules = merge(params, rest)

        def step(carry: Any, number: Array) -> Any:
            ids, cache = carry
            call = Call(modules=modules, key=jax.random.fold_in(key, number), skip=skip)
            extra = {"generated": jnp.full(ids.shape, number)}
            logits, cache, report = model.extend(ids, cache, plan=plan, call=call, extra=extra)
            entered = {site: told.mean() for site, told in report.entered.items()}
            ids = logits.argmax(-1).astype(jnp.int32)
            return (ids, cache), (ids[:, 0], entered)

        cache = fill(cache, count, held, entries)
        ids = jnp.zeros((*cache.seen.shape, 1), jnp.int32)
        (_, cache), (ids, entered) = jax.lax.scan(step, (ids, cache), jnp.arange(steps))
        return cache, ids, jax.tree.map(jnp.mean, entered)

    return f, params, rest


def fill(cache: KVCache, count: int, held: Sequence[int], shares: Mapping[int, float]) -> KVCache:
    """The cache as if `count` tokens had been seen, of which each layer holds so many; shares: of
    those with an entry, by layer, 1 by default. What the entries hold stays as it is."""

    def one(layer: int, slots: Any) -> Any:
        entries = min(slots.capacity, round(shares.get(layer, 1.0) * held[layer]))
        place = jnp.arange(slots.capacity, dtype=jnp.float32)
        # Spread over the sequence.
        place = jnp.where(place < entries, jnp.floor(place * count / max(entries, 1)), -1.0)
        return dataclasses.replace(
            slots,
            position=jnp.broadcast_to(place, slots.position.shape),
            dropped=jnp.zeros_like(slots.dropped),
        )

    layers = tuple(one(i, slots) for i, slots in enumerate(cache.layers))
    return dataclasses.replace(cache, layers=layers, seen=jnp.full_like(cache.seen, count))


def token_macs(model: Decoder, plan: Plan, shares: Mapping[str, float], tokens: int) -> float:
    """Of one token behind a cache of so many: what it costs where it enters, times the share of
    tokens that do; routers included."""
    config, reduction = model.config, cache_reduction(plan)
    share = lambda kind, layer: shares.get(f"{kind}_{layer}", 1.0)  # noqa: E731
    total = config.outer_macs(1)
    for layer in range(config.depth):
        spans = (shares.get(site.name, 1.0) for site, _ in plan.enclosing(layer))
        whole = share("around", layer) * math.prod(spans)
        attended, fed = whole * share("around_attention", layer), whole * share("around_mlp", layer)
        held = reduction.held(tokens, layer, config.depth)
        total += config.layer_macs(attended, attended, attended * held, fed)
    return total + sum(r.macs(1, config.layout) for _, r in plan.steps)
