"""What a forward pass hands to reductions, and what it reports of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from tokred.maps import Keep, TokenMap
from tokred.ops import gather
from tokred.ops.gather import aligned
from tokred.plan import LAYER_SITES, MODEL_SITES, PARTS, Ask, LayerCount, Plan, Reduction, Site
from tokred.tokens import Tokens

_DRAWS = 1_000_003  # folded into a key with the number of a part; above those of layers


def _of(part: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """What is there of one part, without its name in front."""
    start = f"{part}/"
    return {k.removeprefix(start): value for k, value in named.items() if k.startswith(start)}


@dataclass(frozen=True)
class Call:
    """What one forward pass hands to reductions: modules and states by site name, a key, a mode.

    key: draws of a layer come from it and the layer's number. remat: how many of the first layers,
    which hold the most tokens, compute their activations again in the backward pass instead of
    storing them. skip: in decoding, leave out a layer that no example's token enters, at the price
    of asking all of them. given: what is no token of this model, by name, for `Ask('given')`.
    """

    modules: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    states: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    key: PRNGKeyArray | None = None
    train: bool = False
    remat: int = 0
    skip: bool = False
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def look_up(self, ask: Ask) -> Any:
        """What was given under the name that is asked for. Raises ValueError where nothing was."""
        if ask.rows not in self.given:
            raise ValueError(
                f"Ask {ask.name!r}: nothing is given as {ask.rows!r}, only {sorted(self.given)}; "
                "pass it in Call(given=...)."
            )
        return self.given[ask.rows]

    def of(self, part: str) -> "Call":
        """What the sites of one part are handed, see `Plan.of`; draws differ between parts."""
        inside = self.in_layer(_DRAWS + PARTS.index(part))
        modules, states = _of(part, self.modules), _of(part, self.states)
        return dataclasses.replace(inside, modules=modules, states=states)

    def in_layer(self, number: int | Array) -> "Call":
        """The same with this layer's own key."""
        key = None if self.key is None else jax.random.fold_in(self.key, number)
        return dataclasses.replace(self, key=key)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["map", "state", "aux", "evidence"],
    meta_fields=["site"],
)
@dataclass(frozen=True)
class Record:
    """What happened at one site."""

    site: str
    map: Any  # a TokenMap, None for the identity
    state: Any
    aux: Any
    evidence: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "maps", "sources", "aux", "states", "evidence", "parts"],
    meta_fields=["counts"],
)
@dataclass(frozen=True)
class Report:
    """What a run did; what nobody reads costs nothing under jit.

    tokens: the last Tokens · maps, aux (rates, losses, overflow), states, evidence: by site name
    · sources: Int[*B S] at every layer's input to attention · counts: static, per layer · parts: of
    a model that has several, their own reports; tokens, sources and counts are the last one's.
    """

    tokens: Any
    maps: Any
    sources: Any
    aux: Any
    states: Any
    evidence: Any
    counts: tuple[LayerCount, ...] = ()
    parts: Mapping[str, "Report"] = dataclasses.field(default_factory=dict)

    @property
    def entered(self) -> dict[str, Array]:
        """Which tokens [*B N] entered each layer, or branch, that they may skip; by site."""
        return {site: aux["entered"] for site, aux in self.aux.items() if "entered" in aux}

    def restore(self, y: Array, fill: float = 0) -> Array:
        """What the last tokens have [*B K ...], such as a decoder's logits, for every original
        [*B S ...]: that of the token it is now part of, `fill` where it is gone."""
        source = self.tokens.source
        if source is None:
            return y
        back = gather(y, jnp.maximum(source, 0), axis=source.ndim - 1)
        here = aligned(source >= 0, back.ndim, source.ndim - 1)
        return jnp.where(here, back, jnp.asarray(fill, y.dtype))

    @property
    def losses(self) -> dict[str, Array]:
        """Auxiliary losses by 'site/name': entries of aux that start with 'loss'."""
        return {
            f"{site}/{name}": value
            for site, aux in self.aux.items()
            for name, value in aux.items()
            if name.startswith("loss")
        }


def join_reports(parts: Mapping[str, Report], last: str) -> Report:
    """One Report of a model's parts: sites as 'part/site' (of the part '' by their own names),
    tokens, sources and counts of `last`."""
    join = lambda field: {  # noqa: E731
        f"{part}/{site}".removeprefix("/"): value
        for part, report in parts.items()
        for site, value in getattr(report, field).items()
    }
    named = {field: join(field) for field in ("maps", "aux", "states", "evidence")}
    end = parts[last]
    return Report(tokens=end.tokens, sources=end.sources, counts=end.counts, parts=parts, **named)


def make_report(
    tokens: Tokens, records: Sequence[Record], sources: Sequence[Array], counts: tuple
) -> Report:
    """The Report of the records of a forward pass."""
    return Report(
        tokens=tokens,
        maps={r.site: r.map for r in records if r.map is not None},
        sources=tuple(sources),
        aux={r.site: r.aux for r in records if r.aux},
        states={r.site: r.state for r in records if r.state is not None},
        evidence={r.site: r.evidence for r in records if r.evidence},
        counts=counts,
    )


def reduce_at(
    plan: Plan,
    site: Site,
    tokens: Tokens,
    provide: Callable[[Ask], Any],
    call: Call,
) -> tuple[Tokens, tuple[Record, ...]]:
    """Every reduction of `plan` at `site`, in order; later ones see evidence moved by earlier maps.

    provide: the array of an Ask for the tokens as they are at this site.
    """
    steps = plan.at_site(site)
    evidence = {ask.name: provide(ask) for _, reduction in steps for ask in reduction.asks}
    records = []
    for step, (_, reduction) in enumerate(steps):
        mine = {ask.name: evidence[ask.name] for ask in reduction.asks}
        tokens, map_, state, aux = reduction(
            tokens,
            mine,
            call.states.get(site.name),
            module=_module(reduction, site, call),
            key=_key(step, site, call),
            train=call.train,
            twin=plan.twin,
        )
        if map_ is not None and step + 1 < len(steps):
            evidence = {name: _moved(name, value, map_) for name, value in evidence.items()}
        records.append(Record(site.name, map_, state, aux, mine))
    return tokens, tuple(records)


def reduce_model(
    plan: Plan, kind: str, tokens: Tokens, call: Call
) -> tuple[Tokens, tuple[Record, ...]]:
    """Every reduction at a site of the whole model, where only 'hidden' and 'given' are there to
    ask for."""

    def give(ask: Ask) -> Any:
        if ask.kind == "given":
            return call.look_up(ask)
        if ask.kind != "hidden":
            raise ValueError(
                f"Plan {plan.name!r}: site {kind!r} gives 'hidden' or 'given', not {ask.name!r}."
            )
        return tokens.x

    return reduce_at(plan, Site(kind), tokens, give, call)


def _module(reduction: Reduction, site: Site, call: Call) -> Any:
    if type(reduction).build is Reduction.build:
        return None
    return call.modules.get(reduction.module_name(site))


def _key(step: int, site: Site, call: Call) -> PRNGKeyArray | None:
    if call.key is None:
        return None
    number = (LAYER_SITES + MODEL_SITES).index(site.kind)
    key = jax.random.fold_in(call.key, 16 * step + number)
    return key if site.until is None else jax.random.fold_in(key, site.until)


def _moved(name: str, value: Any, map_: TokenMap) -> Any:
    if name.startswith("given"):
        return value
    if name.startswith("probs"):
        raise ValueError("Plan: two reductions at one site cannot share 'probs'; use two sites.")
    return map_.apply(value, "keep" if isinstance(map_, Keep) else "mean")
