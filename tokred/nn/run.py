"""One block of any transformer run under a plan: every site, in order."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tokred.cache import PLAIN, LayerCache, Look, Memory, cache_reduction, hold
from tokred.combine import Combine
from tokred.evidence import Seen, provide
from tokred.maps import TokenMap
from tokred.nn.block import drop_path
from tokred.plan import ATTENTION, EXPERT_WEIGHT, Ask, Plan, Site
from tokred.report import Call, Record, reduce_at
from tokred.tokens import Tokens

Outcome = tuple[Tokens, tuple[Record, ...]]


class Ran(NamedTuple):
    """What came out of a block or a part of it: source [*B S] as it was at its attention."""

    tokens: Tokens
    records: tuple[Record, ...]
    source: Array
    cache: LayerCache | None


@dataclass(frozen=True)
class Here:
    """Where a forward pass stands: the blocks, this layer, and what reductions are handed.

    blocks: by layer; those that evidence may be asked of. drop: stochastic-depth rate of this
    layer; it acts only with `call.train` and a key. cache: this layer's, None outside decoding.
    fresh: the cache is empty, so that the tokens see each other alone; static. memory: what the
    cross-attention looks at, None for none. mlp_weight: what a rule around the layer multiplies its
    MLP's update by.
    """

    blocks: Mapping[int, Any]
    layer: int
    plan: Plan
    call: Call
    drop: float | Array = 0.0
    cache: LayerCache | None = None
    fresh: bool = False
    memory: Memory | None = None
    mlp_weight: Array | None = None

    @property
    def block(self) -> Any:
        return self.blocks[self.layer]

    def reduce(
        self, kind: str, tokens: Tokens, seen: Seen | None = None, *, until: int | None = None
    ) -> Outcome:
        """All reductions at one of the sites that begin with this layer; `seen` is projected where
        it is None."""
        site = Site(kind, self.layer, until)
        if not self.plan.at_site(site):
            return tokens, ()
        give = lambda ask: self._provide(ask, kind, tokens, seen)  # noqa: E731
        return reduce_at(self.plan, site, tokens, give, self.call)

    def _provide(self, ask: Ask, kind: str, tokens: Tokens, seen: Seen | None) -> Any:
        if ask.layer < 0:
            if ask.name not in tokens.extra:
                raise ValueError(
                    f"Ask {ask.name!r} at layer {self.layer}: {self.layer + ask.layer} did not "
                    "store it; move the reduction to a later layer."
                )
            return tokens.extra[ask.name]
        if ask.kind == "normed":
            norm = self.block.norm2 if kind in ("around_mlp", "mid") else self.block.norm1
            return norm(tokens.x)
        if ask.kind == "given":
            return self.call.look_up(ask)
        if ask.kind == "experts":
            return self.block.route(tokens.x)
        if ask.kind == "cached":
            held = jnp.zeros(tokens.batch) if self.cache is None else self.cache.length[:, 0]
            return jnp.broadcast_to(held[..., None], (*tokens.batch, tokens.n))
        if ask.kind == "hidden" or (seen is not None and ask.layer == 0):
            return provide(ask, self._matching(ask, tokens, seen))
        return provide(ask, self.project(tokens, self.layer + ask.layer))

    def _matching(self, ask: Ask, tokens: Tokens, seen: Seen | None) -> Seen:
        if ask.kind == "hidden":
            return Seen(None, None, None, None, tokens)
        if seen is None or seen.tokens.n != tokens.n or seen.q.shape[-3] != tokens.n:
            raise ValueError(
                f"Ask {ask.name!r} at layer {self.layer}: tokens have moved since this layer's "
                "attention; ask at another site, or for 'hidden'."
            )
        return seen

    def project(self, tokens: Tokens, layer: int) -> Seen:
        """Projections of `tokens` by a layer, as evidence."""
        if layer not in self.blocks:
            raise ValueError(
                f"Ask for layer {layer}: the model has {len(self.blocks)} layers; lower Ask.layer."
            )
        block = self.blocks[layer]
        q, k, v = block.project(tokens)
        return Seen(q, k, v, tokens.x, tokens, **block.evidence(tokens))

    def join(self, tokens: Tokens, update: Array, branch: int) -> Tokens:
        """A branch's update added, by stochastic depth in training."""
        if self.call.train and self.call.key is not None:
            key = jax.random.fold_in(self.call.key, 7919 + branch)
            update = drop_path(update, self.drop, key)
        return tokens.replace(x=self.block.join(tokens.x, update, branch))

    def attend(
        self, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens
    ) -> tuple[Array, LayerCache | None]:
        """(update, cache): valid keys are written to the cache before queries look at it, and may
        leave it afterwards."""
        cache = self.cache
        if cache is None:
            return self.block.attend(q, k, v, queries, keys), None
        if keys.bias is not None or keys.policy is not None:
            raise ValueError(
                f"layer {self.layer}: a cache keeps no gates; decode under a plan whose gates "
                "decide (twin='packed' or 'causal')."
            )
        place, how = keys.position[..., 0], cache_reduction(self.plan)
        stored = self.block.unplace(k, place) if cache.raw else k
        if self.fresh:
            update = self.block.attend(q, k, v, queries, keys)
            if how is PLAIN:
                return update, cache.append(stored, v, place, keys.valid)
            whole = hold(stored, v, place, keys.valid, cache.raw, cache.extent)
            return update, how.rest(whole, self._look(q, queries), cache.capacity)
        cache, look = how.write(cache, stored, v, place, keys.valid), self._look(q, queries)
        update = self.block.attend_cached(q, queries, how.read(cache, look))
        return update, how.go_on(cache, look)

    def _look(self, q: Array, queries: Tokens) -> Look:
        place = queries.position[..., 0]
        place = place if queries.valid is None else jnp.where(queries.valid, place, -1.0)
        block = self.block
        return Look(q, place, block.weigh, block.rates, self.layer, len(self.blocks))


def run_block(here: Here, tokens: Tokens) -> Ran:
    """One layer under the plan."""
    tokens, first = here.reduce("before", tokens)
    _check_given(here, tokens)
    tokens, rest, source, cache = _around(here, "around", tokens, _whole)
    tokens, last = here.reduce("after", tokens)
    return Ran(tokens, first + rest + last, source, cache)


def _check_given(here: Here, tokens: Tokens) -> None:
    """Attention that is known beforehand is of all tokens as they are now."""
    if ATTENTION not in tokens.extra:
        return
    kinds = {site.kind for site, _ in here.plan.of_layer(here.layer)}
    others = sorted(kinds & {"around", "around_attention", "keys", "inside"})
    if others or here.cache is not None or not hasattr(here.block, "attend_given"):
        raise ValueError(
            f"layer {here.layer}: its attention is known one step ahead, but it is a "
            f"{type(here.block).__name__} with reductions at {others}; use it in a ViT, with none."
        )


def _whole(here: Here, tokens: Tokens) -> Ran:
    tokens, attended, source, cache = _around(here, "around_attention", tokens, _attention)
    if here.memory is not None:
        tokens = here.join(tokens, here.block.look(tokens.x, here.memory), 2)
    tokens, fed, _, _ = _around(here, "around_mlp", tokens, _mlp)
    return Ran(tokens, attended + fed, source, cache)


def _around(here: Here, kind: str, tokens: Tokens, inner: Callable[[Here, Tokens], Ran]) -> Ran:
    """`inner` on the tokens that enter, put back among all by the rule in aux['combine']."""
    if not here.plan.at(kind, here.layer):
        return inner(here, tokens)
    entered = enter(here, kind, tokens)
    inside = dataclasses.replace(here, mlp_weight=entered.combine.mlp_weight)
    out = _maybe(inside, entered.tokens, entered.map, inner)
    return out._replace(tokens=entered.put_back(out.tokens), records=entered.records + out.records)


class Entered(NamedTuple):
    """Which tokens a reduction lets into a part of the model, and how they are put back."""

    before: Tokens
    tokens: Tokens
    map: TokenMap | None
    combine: Combine
    records: tuple[Record, ...]

    def put_back(self, after: Tokens) -> Tokens:
        """All tokens, given those that entered as they come out."""
        x = self.combine.put_back(self.before.x, self.tokens.x, after.x, self.map)
        return self.before.replace(x=x)


def enter(here: Here, kind: str, tokens: Tokens, until: int | None = None) -> Entered:
    """The reduction that stands around this layer, one of its branches, or the layers `until`.

    Raises ValueError where there are several."""
    reduced, records = here.reduce(kind, tokens, until=until)
    first, *more = records
    if more:
        raise ValueError(f"Plan: one reduction at most can stand at {first.site}.")
    combine = first.aux.get("combine", Combine())
    return Entered(tokens, reduced, first.map, combine, records)


def _maybe(here: Here, tokens: Tokens, map_: TokenMap | None, inner: Callable) -> Ran:
    """`inner`, left out where no token enters: by the plan, or in decoding by the decisions."""
    skipped = Ran(tokens, (), tokens.sources(), here.cache)
    if tokens.n == 0:
        return skipped
    alone = len(here.plan.of_layer(here.layer)) == 1
    if not (here.call.skip and alone and map_ is not None and map_.valid is not None):
        return inner(here, tokens)

    def run() -> tuple[Array, Any]:
        ran = inner(here, tokens)
        return ran.tokens.x, ran.cache

    x, cache = jax.lax.cond(map_.valid.any(), run, lambda: (tokens.x, here.cache))
    return skipped._replace(tokens=tokens.replace(x=x), cache=cache)


def _attention(here: Here, tokens: Tokens) -> Ran:
    tokens, given = _take_attention(tokens)
    q, k, v = here.block.project(tokens)
    seen = Seen(q, k, v, tokens.x, tokens, **here.block.evidence(tokens))
    keys, at_keys = here.reduce("keys", tokens, seen)
    for record in at_keys:
        k, v = _move_keys(record, k, v)
    queries, at_queries = here.reduce("inside", tokens, seen)
    for record in at_queries:
        q = q if record.map is None else record.map.apply(q)
    moved = keys.n != tokens.n or queries.n != tokens.n
    if moved and tokens.policy is not None:
        raise ValueError(f"layer {here.layer}: a policy needs all queries and keys; use one twin.")
    if given is None:
        update, cache = here.attend(q, k, v, queries, keys)
    else:
        update, cache = here.block.attend_given(given, v), None
    tokens = _store(here, here.join(queries, update, 0), seen)
    after, middle = here.reduce("mid", tokens, seen)
    return Ran(after, at_keys + at_queries + middle, queries.sources(), cache)


def _take_attention(tokens: Tokens) -> tuple[Tokens, Array | None]:
    """(tokens without it, probabilities [*B H N N] that a reduction left for this attention)."""
    if ATTENTION not in tokens.extra:
        return tokens, None
    extra = dict(tokens.extra)
    given = jnp.swapaxes(extra.pop(ATTENTION), -3, -2)
    return tokens.replace(extra=extra), given


def _move_keys(record: Record, k: Array, v: Array) -> tuple[Array, Array]:
    return (k, v) if record.map is None else record.map.apply((k, v))


def _store(here: Here, tokens: Tokens, seen: Seen) -> Tokens:
    asks = here.plan.stored_at(here.layer)
    if not asks:
        return tokens
    found: dict[str, Any] = {
        ask.name: provide(dataclasses.replace(ask, layer=0), seen) for ask in asks
    }
    return tokens.replace(extra={**tokens.extra, **found})


def _mlp(here: Here, tokens: Tokens) -> Ran:
    extra = dict(tokens.extra)
    weight = extra.pop(EXPERT_WEIGHT, None)  # of this layer's experts alone
    feed = here.block.feed if weight is None else partial(here.block.feed, experts=weight)
    update = feed(tokens.x)
    if here.mlp_weight is not None:
        update = update * here.mlp_weight[..., None].astype(update.dtype)
    tokens = here.join(tokens.replace(extra=extra), update, 1)
    return Ran(tokens, (), tokens.sources(), here.cache)
