"""One block of any transformer run under a plan: every site, in order."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tokred.evidence import Seen, provide
from tokred.maps import TokenMap
from tokred.nn.block import Block, drop_path
from tokred.plan import Ask, Plan, Site
from tokred.report import Call, Record, reduce_at
from tokred.tokens import Tokens

Outcome = tuple[Tokens, tuple[Record, ...]]


@dataclass(frozen=True)
class Here:
    """Where a forward pass stands: the blocks, this layer, and what reductions are handed.

    drop: stochastic-depth rate of this layer; it acts only with `call.train` and a key.
    """

    blocks: Sequence[Block]
    layer: int
    plan: Plan
    call: Call
    drop: float | Array = 0.0

    @property
    def block(self) -> Block:
        return self.blocks[self.layer]

    def reduce(self, kind: str, tokens: Tokens, seen: Seen | None = None) -> Outcome:
        """All reductions at one of this layer's sites; `seen` is projected where it is None."""
        site = Site(kind, self.layer)
        if not self.plan.at(site.kind, site.layer):
            return tokens, ()
        give = lambda ask: self._provide(ask, tokens, seen)  # noqa: E731
        return reduce_at(self.plan, site, tokens, give, self.call)

    def _provide(self, ask: Ask, tokens: Tokens, seen: Seen | None) -> Array:
        if ask.layer < 0:
            if ask.name not in tokens.extra:
                raise ValueError(
                    f"Ask {ask.name!r} at layer {self.layer}: {self.layer + ask.layer} did not "
                    "store it; move the reduction to a later layer."
                )
            return tokens.extra[ask.name]
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
        if layer >= len(self.blocks):
            raise ValueError(
                f"Ask for layer {layer}: the model has {len(self.blocks)} layers; lower Ask.layer."
            )
        return Seen(*self.blocks[layer].project(tokens.x), tokens.x, tokens)

    def path(self, update: Array, branch: int) -> Array:
        """Stochastic depth of one branch."""
        if not self.call.train or self.call.key is None:
            return update
        key = jax.random.fold_in(self.call.key, 7919 + 2 * self.layer + branch)
        return drop_path(update, self.drop, key)


def run_block(here: Here, tokens: Tokens) -> tuple[Tokens, tuple[Record, ...], Array]:
    """One layer under the plan: (tokens, records, source [*B S] at its attention)."""
    tokens, first = here.reduce("before", tokens)
    tokens, rest, source = _around(here, "around", tokens, _whole)
    tokens, last = here.reduce("after", tokens)
    return tokens, first + rest + last, source


def _whole(here: Here, tokens: Tokens) -> tuple[Tokens, tuple[Record, ...], Array]:
    tokens, attended, source = _around(here, "around_attention", tokens, _attention)
    tokens, fed, _ = _around(here, "around_mlp", tokens, _mlp)
    return tokens, attended + fed, source


def _around(here: Here, kind: str, tokens: Tokens, inner: Callable) -> tuple:
    """`inner` on reduced tokens, its update put back: x + restore(w update), skipped ones scaled.

    aux 'kept_weight' [*B K] and 'skip_scale' [*B N] are optional, both default 1.
    """
    reduced, records = here.reduce(kind, tokens)
    out, more, source = inner(here, reduced)
    moved = [(record.map, record.aux) for record in records if record.map is not None]
    if not moved:
        return out, records + more, source
    if len(moved) > 1:
        raise ValueError(f"Plan: one reduction at most can stand at {kind}_{here.layer}.")
    [(map_, aux)] = moved
    update = out.x - reduced.x
    weight, skip = (aux.get(name) for name in ("kept_weight", "skip_scale"))
    update = update if weight is None else update * weight[..., None].astype(update.dtype)
    x = _skipped(tokens.x, map_, skip) + map_.restore(update)
    return tokens.replace(x=x), records + more, source


def _skipped(x: Array, map_: TokenMap, scale: Array | None) -> Array:
    if scale is None:
        return x
    return jnp.where((map_.source < 0)[..., None], x * scale[..., None].astype(x.dtype), x)


def _attention(here: Here, tokens: Tokens) -> tuple[Tokens, tuple[Record, ...], Array]:
    q, k, v = here.block.project(tokens.x)
    seen = Seen(q, k, v, tokens.x, tokens)
    keys, at_keys = here.reduce("keys", tokens, seen)
    for record in at_keys:
        k, v = _move_keys(record, k, v)
    queries, at_queries = here.reduce("inside", tokens, seen)
    for record in at_queries:
        q = q if record.map is None else record.map.apply(q)
    moved = keys.n != tokens.n or queries.n != tokens.n
    if moved and tokens.policy is not None:
        raise ValueError(f"layer {here.layer}: a policy needs all queries and keys; use one twin.")
    update = here.path(here.block.attend(q, k, v, keys), 0)
    tokens = queries.replace(x=queries.x + update)
    tokens = _store(here, tokens, seen)
    after, middle = here.reduce("mid", tokens, seen)
    return after, at_keys + at_queries + middle, queries.sources()


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


def _mlp(here: Here, tokens: Tokens) -> tuple[Tokens, tuple[Record, ...], Array]:
    update = here.path(here.block.feed(tokens.x), 1)
    return tokens.replace(x=tokens.x + update), (), tokens.sources()
