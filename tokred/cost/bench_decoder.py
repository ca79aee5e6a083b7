"""Decoders under plans beside the dense one: forward pass, gradient, and decoding step by step."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from tokred.cost.bench import Candidate, Row, choose_plans, split, time_rows, with_ratios
from tokred.cost.compiled import compile_cost
from tokred.cost.decoding import decode_rows
from tokred.cost.macs import macs
from tokred.cost.timing import Rounds
from tokred.models import Decoder, DecoderConfig
from tokred.plan import AROUND, Plan
from tokred.report import Call

PLAIN = "dense, plain attention"


@dataclass(frozen=True)
class Passes:
    """What is timed beside the forward pass; static.

    train: the loss of the next token and its gradient to every parameter, with what reductions add
    to the loss, without an optimizer; remat: in little memory, equal layers as one scanned body
    that computes its activations again. decode: `steps` tokens one by one, the last of so many,
    with the cache of all before them, each entering a layer with probability `share`.
    """

    train: bool = False
    decode: bool = False
    steps: int = 32
    share: float = 0.125
    remat: bool = False


FORWARD = Passes()


def bench_decoder(
    config: DecoderConfig,
    methods: Sequence[str],
    *,
    tokens: int = 1024,
    batch: int = 8,
    rounds: int | Rounds = 10,
    keep: float | None = None,
    ratio: float | None = None,
    round_to: int = 1,
    passes: Passes = FORWARD,
    best_dense: bool = False,
    seed: int = 0,
) -> list[Row]:
    """One row per pass and method, the dense model first, all with the same random weights.

    'forward' and 'train' run the packed twin on sequences of `tokens` ids; 'decode' runs the causal
    one, 'decode, skip' leaves out a layer that no row of the batch enters. All rows of a pass take
    turns. keep, ratio, round_to: as in `bench`. Ratios are to the dense model with the same
    attention; best_dense: to the faster of that and the dense model with plain attention.
    Row: pass, method, macs (one example's forward pass, or one token), macs_ratio, ms (median of a
    batch, or of one token of each row), ms_ratio, ms_low, ms_high, compile_s, compile_ratio,
    temp_bytes; when decoding, None else: share (of layers entered where there is a choice),
    cache_bytes (all slots), used_bytes (slots with an entry).

    Raises:
      ValueError: an unknown method or one that does not fit a decoder, a budget out of its reach,
        more tokens than the context, or more steps than tokens.
    """
    _check(config, tokens, passes)
    config = dataclasses.replace(config, context=tokens)
    plans = choose_plans(config, methods, keep, ratio, round_to)
    for name, plan in plans.items():
        _check_fit(name, plan, config, passes.decode)
    models, key = _models(config, plans, best_dense, seed), jax.random.key(seed)
    ids = jax.random.randint(key, (batch, tokens + 1), 0, config.vocab)
    rows = _whole_rows("forward", forward, models, ids, key, rounds)
    if passes.train:
        trained, make = models, gradient
        if passes.remat:
            scanned = dataclasses.replace(config, scan=True)
            trained = _models(scanned, plans, best_dense, seed)
            make = partial(gradient, remat=config.depth)
        rows += _whole_rows("train", make, trained, ids, key, rounds)
    if passes.decode:
        steps, share = passes.steps, passes.share
        models.pop(PLAIN, None)
        rows += decode_rows(models, tokens, batch, steps, share, key, rounds)
    return beside_dense(rows)


def _models(
    config: DecoderConfig, plans: Mapping[str, Plan], plain: bool, seed: int
) -> dict[str, tuple[Decoder, Plan]]:
    """Model and plan of every row of a pass; plain: one with plain attention too."""
    model = Decoder(config, rngs=nnx.Rngs(seed))
    models = {name: (model, plan) for name, plan in plans.items()}
    if plain:
        config = dataclasses.replace(config, attention="reference")
        models[PLAIN] = Decoder(config, rngs=nnx.Rngs(seed)), plans["dense"]
    return models


def forward(model: Decoder, plan: Plan) -> tuple[Callable[..., Array], Any, Any]:
    """(f, params, rest): f(params, rest, ids [B N+1], key) gives the logits [B N vocab]."""
    run, params, rest = _run(model, plan)
    return lambda params, rest, ids, key: run(params, rest, ids, key)[0], params, rest


def gradient(model: Decoder, plan: Plan, remat: int = 0) -> tuple[Callable[..., Any], Any, Any]:
    """(f, params, rest): f(params, rest, ids [B N+1], key) gives the loss and its gradient.

    remat: how many layers compute their activations again."""
    run, params, rest = _run(model, plan, train=True, remat=remat)

    def loss(params: Any, rest: Any, ids: Array, key: Array) -> Array:
        logits, report = run(params, rest, ids, key)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return nats.mean() + sum(report.losses.values())

    return jax.value_and_grad(loss), params, rest


def _run(model: Decoder, plan: Plan, **how: Any) -> tuple[Callable[..., Any], Any, Any]:
    merge, params, rest = split(model, plan)

    def run(params: Any, rest: Any, ids: Array, key: Array) -> Any:
        model, modules = merge(params, rest)
        ids = ids[:, :-1]
        extra = {"generated": jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)}
        call = Call(modules=modules, key=key, **how)
        return model(ids, plan=plan, call=call, extra=extra)

    return run, params, rest


def _whole_rows(
    kind: str,
    make: Callable[..., Any],
    models: Mapping[str, tuple[Decoder, Plan]],
    ids: Array,
    key: Array,
    rounds: int | Rounds,
) -> list[Row]:
    """Rows of a pass over whole sequences."""
    candidates, counts = {}, {}
    for name, (model, plan) in models.items():
        f, *state = make(model, plan)
        args = (*state, ids, key)
        cost = compile_cost(f, *args)
        candidates[name] = Candidate(cost, lambda cost=cost, args=args: cost.run(*args))
        counts[name] = macs(model.config, plan)
    rows = time_rows(candidates, rounds, warmup=1)
    empty = {"share": None, "cache_bytes": None, "used_bytes": None}
    return [
        {"pass": kind, "method": name, "macs": counts[name], **row, **empty}
        for name, row in rows.items()
    ]


def beside_dense(rows: Sequence[Row]) -> list[Row]:
    """Every row beside the faster of the dense ones of its pass; skipping changes no pass."""
    whole = lambda row: row["pass"].split(",")[0]  # noqa: E731
    base: dict[str, Row] = {}
    for row in rows:
        if row["method"] in ("dense", PLAIN):
            base[whole(row)] = min(row, base.get(whole(row), row), key=lambda r: r["ms"])
    return [with_ratios(row, base[whole(row)]) for row in rows]


def _check(config: DecoderConfig, tokens: int, passes: Passes) -> None:
    if not 2 <= tokens <= config.context:
        raise ValueError(
            f"bench_decoder: tokens={tokens} must lie in [2, {config.context}], the model's "
            "context; change tokens or choose another model."
        )
    if passes.decode and not 1 <= passes.steps < tokens:
        raise ValueError(
            f"bench_decoder: steps={passes.steps} must lie in [1, {tokens - 1}], so that the "
            "first finds a cache; change steps or tokens."
        )
    if not 0 <= passes.share <= 1:
        raise ValueError(f"bench_decoder: share={passes.share} must lie in [0, 1]; change share.")


def _check_fit(name: str, plan: Plan, config: DecoderConfig, decode: bool) -> None:
    left = plan.counts(config.layout)[-1].out
    if left != config.context:
        raise ValueError(
            f"bench_decoder: method {name!r} leaves {left} of {config.context} tokens, and a "
            "decoder's loss needs all of them; choose a method that routes tokens around "
            "layers, such as 'mod'."
        )
    decides = all(r.decides for site, r in plan.steps if site.kind in AROUND)
    if decode and not decides:
        raise ValueError(
            f"bench_decoder: method {name!r} lets no token decide alone; leave out decode or "
            "choose another method."
        )
