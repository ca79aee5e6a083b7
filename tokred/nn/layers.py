"""All blocks of a model under a plan: one after another, or equal ones as one scanned body."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tokred.cache import LayerCache, Memory
from tokred.nn.run import Entered, Here, Ran, enter, run_block
from tokred.plan import LayerCount, Plan, Reduction, Site
from tokred.report import Call, Record
from tokred.tokens import Tokens

PERIODS = (1, 2, 3, 4)


class LayersRan(NamedTuple):
    """Tokens after the last layer, records, sources at every layer's attention, filled caches."""

    tokens: Tokens
    records: tuple[Record, ...]
    sources: tuple[Array, ...]
    caches: tuple[LayerCache, ...] | None


class Run(NamedTuple):
    """Layers start, start + 1, ...: `repeats` times a group of `period` layers; static."""

    start: int
    period: int
    repeats: int


@dataclass(frozen=True)
class Layers:
    """Blocks with what runs them: drop, stochastic-depth rate of every layer; memories, what the
    cross-attention of every layer looks at, empty for none. scan: see `runs`."""

    blocks: Sequence[Any]
    drop: Sequence[float] = ()
    scan: bool = False
    memories: Sequence[Memory] = ()

    def rate(self, layer: int) -> float:
        return self.drop[layer] if self.drop else 0.0

    def memory(self, layer: int) -> Memory | None:
        return self.memories[layer] if self.memories else None

    def __call__(
        self,
        tokens: Tokens,
        plan: Plan,
        call: Call,
        counts: Sequence[LayerCount],
        *,
        caches: Sequence[LayerCache] | None = None,
        fresh: bool = False,
        only: range | None = None,
    ) -> LayersRan:
        """Runs all blocks, or only some that follow each other. counts: of the plan. caches: of
        every layer; with them nothing is scanned, since stacking would copy them. fresh: see
        `Here`.

        Raises:
          ValueError: caches, and a reduction around several layers in which no token decides alone;
            or such layers that run only in part.
        """
        records, sources, filled, outside = (), [], [], []
        scan = self.scan and caches is None
        every = range(len(self.blocks)) if only is None else only
        _check_whole(plan, every)
        for run in self.runs(plan, call, counts, only) if scan else _single(every):
            for site, reduction in plan.opening(run.start):
                _check_caches(site, reduction, caches)
                outside.append(self._enter(site, plan, call, tokens))
                tokens, records = outside[-1].tokens, records + outside[-1].records
            cache = None if caches is None else caches[run.start]
            ran = self._run(run, tokens, plan, call, cache, fresh)
            tokens, records = ran.tokens, records + ran.records
            sources += ran.sources
            filled += ran.caches or ()
            for _ in plan.closing(run.start + _length(run) - 1):
                tokens = outside.pop().put_back(tokens)
        return LayersRan(tokens, records, tuple(sources), None if caches is None else tuple(filled))

    def _enter(self, site: Site, plan: Plan, call: Call, tokens: Tokens) -> Entered:
        """What stands around several layers, at the first of them."""
        first = site.layers.start
        here = Here(dict(enumerate(self.blocks)), first, plan, call.in_layer(first))
        entered = enter(here, site.kind, tokens, site.until)
        if entered.combine.mlp_weight is not None:
            raise ValueError(
                f"Plan {plan.name!r}: rule='mlp_branch' means one layer's MLP and cannot stand at "
                f"{site.name}; use rule='residual'."
            )
        return entered

    def _run(
        self, run: Run, tokens: Tokens, plan: Plan, call: Call, cache: Any, fresh: bool
    ) -> LayersRan:
        """One group of layers; none of them is run where no token is there."""
        if tokens.n == 0:
            return LayersRan(tokens, (), (tokens.sources(),) * _length(run), (cache,))
        remat = jax.checkpoint if run.start < call.remat else lambda f: f
        if run.repeats > 1:
            return self._scan(run, tokens, plan, call, remat)
        ran = remat(functools.partial(self._layer, run.start, plan, call, cache, fresh))(tokens)
        return LayersRan(ran.tokens, ran.records, (ran.source,), (ran.cache,))

    def _layer(
        self, layer: int, plan: Plan, call: Call, cache: Any, fresh: bool, tokens: Tokens
    ) -> Ran:
        blocks = dict(enumerate(self.blocks))
        call, memory = call.in_layer(layer), self.memory(layer)
        here = Here(blocks, layer, plan, call, self.rate(layer), cache, fresh, memory)
        return run_block(here, tokens)

    def runs(
        self, plan: Plan, call: Call, counts: Sequence[LayerCount], only: range | None = None
    ) -> list[Run]:
        """Groups of equal layers that repeat: equal blocks and reductions which put back as many
        tokens as came, and ask for nothing of other layers. Compiling gets faster, but a step
        copies the weights once."""
        only = range(len(self.blocks)) if only is None else only
        kinds = [self._kind(layer, plan, call, counts) for layer in range(only.stop)]
        found, start = [], only.start
        while start < only.stop:
            best = max((_repeat(kinds, start, p) for p in PERIODS), key=_length)
            found.append(best if best.repeats > 1 else Run(start, 1, 1))
            start += _length(found[-1])
        return found

    def _kind(self, layer: int, plan: Plan, call: Call, counts: Sequence[LayerCount]) -> Any:
        """What makes two layers equal; None for a layer that must run alone."""
        steps, spans = plan.of_layer(layer), plan.enclosing(layer)
        far = any(ask.layer for _, reduction in steps for ask in reduction.asks)
        before = counts[layer - 1].out if layer else None
        changes = not spans and before is not None and counts[layer].out != before
        if far or changes or plan.stored_at(layer):
            return None
        modules = [_graph(call.modules.get(r.module_name(site))) for site, r in steps]
        sites = [(site.kind, reduction) for site, reduction in steps]
        return _graph(self.blocks[layer]), sites, modules, [site for site, _ in spans]

    def _scan(self, run: Run, tokens: Tokens, plan: Plan, call: Call, remat: Any) -> LayersRan:
        group = range(run.start, run.start + run.period)
        graphs = {layer: _graph(self.blocks[layer]) for layer in group}
        own = {n: _graph(call.modules[n]) for n in _names(plan, group) if n in call.modules}

        def body(carry: Tokens, turn: Mapping[str, Any]) -> tuple[Tokens, Any]:
            modules = {name: nnx.merge(own[name], state) for name, state in turn["own"].items()}
            inner = dataclasses.replace(
                call, modules={**call.modules, **modules}, states={**call.states, **turn["states"]}
            )
            records, sources = (), []
            for j, layer in enumerate(group):
                blocks = {layer: nnx.merge(graphs[layer], turn["blocks"][j])}
                now = inner.in_layer(turn["number"] + j)
                memory = self.memory(layer)  # of tokens, the same in all layers
                ran = run_block(
                    Here(blocks, layer, plan, now, turn["drop"][j], memory=memory), carry
                )
                carry, records = ran.tokens, records + ran.records
                sources.append(ran.source)
            return carry, (records, sources)

        turns = [self._turn(run, number, plan, call, own) for number in range(run.repeats)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *turns)
        tokens, (records, sources) = jax.lax.scan(remat(body), tokens, stacked)
        take = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: E731
        told = [
            _renamed(take(record, i), i * run.period)
            for i in range(run.repeats)
            for record in records
        ]
        at = tuple(s[i] for i in range(run.repeats) for s in sources)
        return LayersRan(tokens, tuple(told), at, None)

    def _turn(
        self, run: Run, number: int, plan: Plan, call: Call, own: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What differs between the turns of a scan, under the names of the first group."""
        shift = number * run.period
        group = range(run.start + shift, run.start + shift + run.period)
        names = {_shifted(name, -shift): name for name in _names(plan, group)}
        return {
            "number": group.start,
            "blocks": [nnx.state(self.blocks[layer]) for layer in group],
            "drop": [self.rate(layer) for layer in group],
            "own": {first: nnx.state(call.modules[name]) for first, name in names.items()
                    if first in own},
            "states": {first: call.states[name] for first, name in names.items()
                       if name in call.states},
        }  # fmt: skip


def _single(layers: range) -> list[Run]:
    return [Run(layer, 1, 1) for layer in layers]


def _check_caches(site: Site, reduction: Reduction, caches: Any) -> None:
    if caches is not None and not reduction.decides:
        raise ValueError(
            f"{type(reduction).__name__} at {site.name} looks at earlier tokens, of which a cache "
            "keeps nothing; decode by full passes, without a cache."
        )


def _check_whole(plan: Plan, only: range) -> None:
    for site, _ in plan.spans:
        inside = [layer in only for layer in site.layers]
        if any(inside) and not all(inside):
            raise ValueError(
                f"Plan {plan.name!r}: only layers {only.start}..{only.stop - 1} run, a part of the "
                f"span {site.name}; end the span at their border."
            )


def _length(run: Run) -> int:
    return run.period * run.repeats


def _repeat(kinds: Sequence[Any], start: int, period: int) -> Run:
    """How often the group at `start` comes again right away; groups of one, if not at all."""
    group = list(kinds[start : start + period])
    if len(group) < period or None in group:
        return Run(start, period, 0)
    repeats = 1
    while list(kinds[start + repeats * period : start + (repeats + 1) * period]) == group:
        repeats += 1
    return Run(start, period, repeats if repeats > 1 else 0)


def _graph(module: Any) -> Any:
    return None if module is None else nnx.split(module)[0]


def _names(plan: Plan, group: range) -> list[str]:
    """Sites of these layers that have modules or states of their own."""
    steps = (step for layer in group for step in plan.of_layer(layer))
    return sorted({site.name for site, r in steps if r.module_name(site) == site.name})


def _shifted(name: str, by: int) -> str:
    kind, _, layer = name.rpartition("_")
    return Site(kind, int(layer) + by).name


def _renamed(record: Record, by: int) -> Record:
    return dataclasses.replace(record, site=_shifted(record.site, by))
