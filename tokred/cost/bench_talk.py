"""Vision-language models with fewer and fewer visual tokens, beside the one that keeps them all."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tokred.cost.bench import Candidate, Row, split, time_rows, with_ratios
from tokred.cost.compiled import compile_cost
from tokred.cost.macs import macs
from tokred.cost.timing import Rounds
from tokred.methods import get_method, make_plan
from tokred.models.vlm import VLM, VLMConfig
from tokred.plan import Plan
from tokred.report import Call


def bench_talk(
    config: VLMConfig,
    methods: Sequence[str],
    *,
    lengths: Sequence[int],
    tokens: int = 64,
    batch: int = 4,
    rounds: int | Rounds = 10,
    seed: int = 0,
) -> list[Row]:
    """One row per method and number of visual tokens, the dense model first, all with the same
    random weights.

    Times the prefill: images and prompts of `tokens` ids to logits, compiled, in alternating
    rounds. lengths: of each image's tokens, for methods that take a length, or a keep. Row: as of
    `bench`, with 'pass' and 'tokens'.

    Raises:
      ValueError: an unknown method, or a length out of its reach.
    """
    more = config.images * config.image_tokens()
    config = dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, context=tokens + more)
    )
    plans = {"dense": Plan(), **_plans(config, methods, lengths)}
    model, key = VLM(config, rngs=nnx.Rngs(seed)), jax.random.key(seed)
    vision = config.vision
    images = jax.random.normal(key, (batch, config.images, *vision.image_size, vision.channels))
    ids = jnp.full((batch, tokens), 3).at[:, : config.images].set(config.image_id)
    candidates = {name: _candidate(model, plan, ids, images) for name, plan in plans.items()}
    rows = [
        {"pass": "prefill", "method": name, "tokens": config.image_tokens(plans[name]), **row}
        for name, row in time_rows(candidates, rounds, warmup=1).items()
    ]
    rows = [row | {"macs": macs(config, plans[row["method"]], tokens=tokens)} for row in rows]
    return [with_ratios(row, rows[0]) for row in rows]


def _plans(config: VLMConfig, methods: Sequence[str], lengths: Sequence[int]) -> dict[str, Plan]:
    whole = config.image_tokens()
    plans = {}
    for name in methods:
        if name == "dense":
            continue
        for length in lengths:
            exact = "length" in get_method(name).options
            how: dict[str, Any] = {"length": length} if exact else {"keep": length / whole}
            plans[f"{name} {length}"] = make_plan(name, config.layout, **how)
    return plans


def _candidate(model: VLM, plan: Plan, ids: Array, images: Array) -> Candidate:
    merge, params, rest = split(model, plan)

    def prefill(params: Any, rest: Any, ids: Array, images: Array) -> Array:
        model, modules = merge(params, rest)
        question = ids != model.config.image_id
        call = Call(modules=modules, key=jax.random.key(0))
        return model(ids, images, plan=plan, call=call, question=question)[0]

    args = (params, rest, ids, images)
    cost = compile_cost(prefill, *args)
    return Candidate(cost, lambda: cost.run(*args))
