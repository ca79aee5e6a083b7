"""Encoder-decoders under plans beside the dense one: encoding, generation, training."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from tokred.cost.bench import Candidate, Row, choose_plans, split, time_rows
from tokred.cost.bench_decoder import FORWARD, Passes, beside_dense
from tokred.cost.compiled import compile_cost
from tokred.cost.macs import macs
from tokred.cost.timing import Rounds
from tokred.models import Conditioned, EncoderDecoder, EncoderDecoderConfig
from tokred.models.buckets import encode_in_buckets
from tokred.models.encoder_decoder import START
from tokred.models.generate import generate
from tokred.plan import Plan
from tokred.report import Call

Run = Callable[[EncoderDecoder, Plan, Array, Call], Any]


def bench_pairs(
    config: EncoderDecoderConfig,
    methods: Sequence[str],
    *,
    tokens: int = 1024,
    batch: int = 16,
    rounds: int | Rounds = 10,
    keep: float | None = None,
    ratio: float | None = None,
    round_to: int = 1,
    passes: Passes = FORWARD,
    seed: int = 0,
) -> list[Row]:
    """One row per pass and method, the dense model first, all with the same random weights.

    'encode' is the encoder alone under the packed plan, with as many slots as the plan has;
    'encode, buckets' chooses them among quarters of the length, for a control that deletes exactly
    the rate. passes.decode: 'generate' encodes and writes passes.steps tokens. passes.train:
    'train' is the loss of a target of config.target_context tokens and its gradient, under the twin
    that a method trains: a soft one saves nothing. Budgets and errors as in `bench_decoder`; so are
    the fields of a row, but for those of caches.
    """
    config = dataclasses.replace(config, context=tokens)
    plans = choose_plans(config, methods, keep, ratio, round_to)
    model, key = EncoderDecoder(config, rngs=nnx.Rngs(seed)), jax.random.key(seed)
    ids = jax.random.randint(key, (batch, tokens), 3, config.vocab)
    controls = {name: control for name, plan in plans.items() if (control := _control(plan))}
    encoder = dataclasses.replace(config, decoder_depth=0, target_context=0)
    kinds: list[tuple[str, Run, Mapping[str, Plan], EncoderDecoderConfig]] = [
        ("encode", _encode, plans, encoder),
        ("encode, buckets", _encode_in_buckets, controls, encoder),
    ]
    if passes.decode:
        whole = dataclasses.replace(config, target_context=passes.steps)
        kinds.append(("generate", _generate(passes.steps), plans, whole))
    rows = []
    for kind, run, chosen, costed in kinds:
        rows += _rows(kind, model, chosen, costed, ids, key, rounds, _plainly(run))
    if passes.train:
        soft = {n: p.with_twin("soft") if _softens(p) else p for n, p in plans.items()}
        rows += _rows("train", model, soft, config, ids, key, rounds, _gradient)
    return beside_dense(rows)


def _softens(plan: Plan) -> bool:
    return any("soft" in reduction.twins for _, reduction in plan.steps)


def _control(plan: Plan) -> Plan | None:
    """The plan with a gate that needs no training to keep its rate; None where there is none."""
    if not plan.steps or getattr(plan.steps[0][1], "gate", None) != "learned":
        return None
    (site, gate), *rest = plan.steps
    stride: Any = dataclasses.replace(gate, **{"gate": "stride"})
    return dataclasses.replace(plan, steps=((site, stride), *rest))


def _encode(model: EncoderDecoder, plan: Plan, ids: Array, call: Call) -> Array:
    return model.encode(ids, plan=plan, call=call)[0].x


def _encode_in_buckets(model: EncoderDecoder, plan: Plan, ids: Array, call: Call) -> Array:
    n = ids.shape[1]
    sizes, summed = (n // 4, n // 2, 3 * n // 4), lambda memory: memory.x.sum(-2)
    return encode_in_buckets(model, ids, sizes, summed, plan=plan, call=call).value


def _generate(steps: int) -> Run:
    def run(model: EncoderDecoder, plan: Plan, ids: Array, call: Call) -> Array:
        memory, _ = model.encode(ids, plan=plan, call=call)
        start = jnp.full((len(ids), 1), START, jnp.int32)
        return generate(Conditioned(model, model.remember(memory)), start, steps=steps).ids

    return run


def _plainly(run: Run) -> Callable[..., Any]:
    """(merge, plan, config) -> f(params, rest, ids, key)."""

    def make(merge: Callable[..., Any], plan: Plan, config: Any) -> Callable[..., Any]:
        def f(params: Any, rest: Any, ids: Array, key: Array) -> Any:
            model, modules = merge(params, rest)
            return run(model, plan, ids, Call(modules=modules, key=key))

        return f

    return make


def _gradient(merge: Callable[..., Any], plan: Plan, config: Any) -> Callable[..., Any]:
    def loss(params: Any, rest: Any, ids: Array, key: Array) -> Array:
        model, modules = merge(params, rest)
        target = ids[:, : config.target_context]
        read = jnp.pad(target, ((0, 0), (1, 0)), constant_values=START)[:, :-1]
        call = Call(modules=modules, states=plan.init(), key=key, train=True)
        logits, report = model(ids, read, plan=plan, call=call)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return nats.mean() + sum(report.losses.values())

    return jax.value_and_grad(loss)


def _rows(
    kind: str,
    model: EncoderDecoder,
    plans: Mapping[str, Plan],
    costed: EncoderDecoderConfig,
    ids: Array,
    key: Array,
    rounds: int | Rounds,
    make: Callable[..., Any],
) -> list[Row]:
    candidates, counts = {}, {}
    for name, plan in plans.items():
        merge, params, rest = split(model, plan)
        args = (params, rest, ids, key)
        cost = compile_cost(make(merge, plan, model.config), *args)
        candidates[name] = Candidate(cost, lambda cost=cost, args=args: cost.run(*args))
        counts[name] = macs(costed, plan)
    rows = time_rows(candidates, rounds, warmup=1)
    return [{"pass": kind, "method": n, "macs": counts[n], **row} for n, row in rows.items()]
