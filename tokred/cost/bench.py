"""Reduced models against the dense one: counted, compiled and timed side by side."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array

from tokred.cost.budget import solve_keep
from tokred.cost.compiled import Compiled, compile_cost
from tokred.cost.macs import Costed, macs
from tokred.cost.timing import Rounds, Timing, time_rounds
from tokred.methods import get_method, make_plan
from tokred.models import ViT, ViTConfig
from tokred.plan import Plan
from tokred.report import Call

Row = dict[str, Any]
RATIOS = {"macs_ratio": "macs", "ms_ratio": "ms", "compile_ratio": "compile_s"}


class Candidate(NamedTuple):
    """What takes part in the rounds: its compiled costs, and one whole call of it."""

    cost: Compiled
    call: Callable[[], Any]


def bench(
    config: ViTConfig,
    methods: Sequence[str],
    *,
    batch: int = 8,
    rounds: int | Rounds = 10,
    keep: float | None = None,
    ratio: float | None = None,
    round_to: int = 1,
    seed: int = 0,
) -> list[Row]:
    """One row per method, the dense model first, all with the same random weights.

    Times the forward pass from images to logits of the packed twin, compiled, dense and reduced
    with the same attention, in alternating rounds. keep: every method's budget; ratio: solve for
    it from a share of the dense MACs; neither: each method's defaults. round_to: see `make_plan`.
    Row: method, macs (one image), macs_ratio, tokens (behind the last layer), tokens_by_layer, ms
    (median of a batch), ms_ratio, ms_low, ms_high, rounds, conversion (time saved / MACs saved),
    compile_s, compile_ratio, temp_bytes (see `Compiled`), attention (its implementations, or why
    not the one asked for); ms_pipelined where `Rounds.ahead` asks for it.

    Raises:
      ValueError: an unknown method, or a budget out of its reach.
    """
    plans = choose_plans(config, methods, keep, ratio, round_to)
    model = ViT(config, rngs=nnx.Rngs(seed))
    key = jax.random.key(seed)
    images = jax.random.normal(key, (batch, *config.image_size, config.channels))
    candidates = {name: _candidate(model, plan, images, key) for name, plan in plans.items()}
    rows = time_rows(candidates, rounds)
    counts = {name: macs(config, plan) for name, plan in plans.items()}
    left = {name: [c.out for c in plan.counts(config.layout)] for name, plan in plans.items()}
    rows = [
        {"method": name, "macs": counts[name], "tokens": left[name][-1], **row}
        | {"tokens_by_layer": left[name]}
        for name, row in rows.items()
    ]
    return [with_ratios(row, rows[0]) for row in rows]


def _candidate(model: ViT, plan: Plan, images: Array, key: Array) -> Candidate:
    f, state = forward(model, plan)
    cost = compile_cost(f, state, images, key)
    return Candidate(cost, lambda: cost.run(state, images, key))


def time_rows(
    candidates: Mapping[Any, Candidate], rounds: int | Rounds, warmup: int = 2
) -> dict[Any, Row]:
    """ms, ms_low, ms_high, rounds, compile_s and temp_bytes of each candidate, timed in turns, and
    ms_pipelined where it is asked for."""
    times = time_rounds({name: c.call for name, c in candidates.items()}, rounds, warmup)
    return {
        name: {
            "ms": 1e3 * times[name].median,
            "ms_low": 1e3 * times[name].low,
            "ms_high": 1e3 * times[name].high,
            **_pipelined(times[name]),
            "rounds": times[name].rounds,
            "compile_s": candidate.cost.seconds,
            "temp_bytes": candidate.cost.temp_bytes,
            "attention": [c.why or c.used for c in candidate.cost.choices if c.op == "attention"],
        }
        for name, candidate in candidates.items()
    }


def _pipelined(time: Timing) -> Row:
    return {} if time.pipelined is None else {"ms_pipelined": 1e3 * time.pipelined}


def choose_plans(
    config: Costed,
    methods: Sequence[str],
    keep: float | None,
    ratio: float | None,
    round_to: int = 1,
) -> dict[str, Plan]:
    """The plan of every method by name, the dense one first; see `choose_plan`."""
    names = ["dense", *(name for name in dict.fromkeys(methods) if name != "dense")]
    return {name: choose_plan(config, name, keep, ratio, round_to) for name in names}


def choose_plan(
    config: Any, name: str, keep: float | None, ratio: float | None, round_to: int = 1
) -> Plan:
    """The method's plan at `keep`, at `ratio` of the dense MACs, or at its defaults."""
    if name != "dense" and ratio is not None:
        return solve_keep(config, name, ratio, round_to=round_to)[0]
    if name == "dense" or keep is None or "keep" not in get_method(name).options:
        return make_plan(name, config.layout, round_to=round_to)
    return make_plan(name, config.layout, keep=keep, round_to=round_to)


def forward(model: ViT, plan: Plan) -> tuple[Callable[..., Array], Any]:
    """(f, state): f(state, images, key) gives the logits [B classes] under the packed plan.

    Learned reductions get modules with random weights.
    """
    modules = nnx.Dict(plan.build(model.config.layout, nnx.Rngs(0)))
    graph, state = nnx.split((model, modules))

    def f(state: Any, images: Array, key: Array) -> Array:
        model, modules = nnx.merge(graph, state)
        return model(images, plan=plan, call=Call(modules=modules, key=key))[0]

    return f, state


def split(model: Any, plan: Plan) -> tuple[Callable[..., Any], Any, Any]:
    """(merge, parameters, the rest): merge(parameters, rest) gives the model and the plan's
    modules, which have random weights."""
    modules = nnx.Dict(plan.build(model.config.layout, nnx.Rngs(0)))
    graph, params, rest = nnx.split((model, modules), nnx.Param, ...)
    return lambda params, rest: nnx.merge(graph, params, rest), params, rest


def with_ratios(row: Row, dense: Row) -> Row:
    """The row beside the dense one; conversion: time saved / MACs saved, None where none are."""
    ratios = {ratio: row[field] / dense[field] for ratio, field in RATIOS.items()}
    saved = 1 - ratios["macs_ratio"]
    conversion = (1 - ratios["ms_ratio"]) / saved if saved > 0 else None
    return row | ratios | {"conversion": conversion}


def device_name() -> str:
    """What the rows were measured on."""
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind}) x {jax.device_count()}"
