"""As many slots as a batch needs: what a gate keeps, in the smallest of a few static sizes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from tokred.models.encoder_decoder import EncoderDecoder
from tokred.models.ids import check_ids
from tokred.plan import Plan, Reduction, Site
from tokred.report import Call, reduce_at, reduce_model
from tokred.select import keep_static
from tokred.tokens import Tokens, move


class Bucketed(NamedTuple):
    """value: of `then` · slots: Int[], the bucket that was taken · padding: Float[], the share of
    its slots, over all examples, that hold no token · kept: Int[B], tokens that were."""

    value: Any
    slots: Array
    padding: Array
    kept: Array


def encode_in_buckets(
    model: EncoderDecoder,
    ids: Int[Array, "B N"],
    buckets: Sequence[int],
    then: Callable[[Tokens], Any],
    *,
    plan: Plan,
    call: Call | None = None,
    valid: Bool[Array, "B N"] | None = None,
) -> Bucketed:
    """`then` of what is left of the source, after layers that ran on the smallest bucket which
    holds what the gate kept of every example; N slots where none does: nothing is cut.

    plan: its first reduction is the gate; it stands before a layer and has a `capacity`, which the
    buckets replace. then: must give arrays of the same shapes for every bucket, such as logits or
    generated tokens; each bucket is compiled with it, and one of them runs. On several devices the
    largest count of all examples decides, which asks all of them. Static: buckets, then, plan.

    Raises:
      ValueError: a plan that does not begin so, or buckets that are no counts.
    """
    call = call or Call()
    call = dataclasses.replace(call, modules={**model.reductions, **call.modules})
    check_ids(ids, model.config, plan)
    site, gate = _gate(plan)
    n, first = ids.shape[1], site.layers.start
    sizes = _sizes(buckets, n)
    encoder, layout = model.encoder, model.config.layout_of(n)
    rest = dataclasses.replace(plan, steps=plan.steps[1:], twin="packed")
    tokens, _ = reduce_model(rest, "input", model.tokens(ids, valid), call)
    tokens = encoder.run(tokens, rest, call, layout, only=range(first)).tokens
    alone = Plan(((site, dataclasses.replace(gate, capacity=1.0)),))
    here = call.in_layer(first)
    tokens, _ = reduce_at(alone, site, tokens, lambda ask: tokens.x, here)
    kept = tokens.valid.sum(-1)

    def run(size: int, tokens: Tokens) -> Any:
        tokens = move(tokens, keep_static(range(size), n, tokens.batch))
        after = range(first, model.config.depth)
        ran = encoder.run(tokens, rest, call, model.config.layout_of(size), only=after)
        memory = ran.tokens.replace(x=encoder.norm(ran.tokens.x))
        return then(reduce_model(rest, "output", memory, call)[0])

    number = jnp.searchsorted(jnp.asarray(sizes), kept.max())
    branches = [lambda tokens, size=size: run(size, tokens) for size in sizes]
    slots = jnp.asarray(sizes)[number]
    value = jax.lax.switch(number, branches, tokens)
    return Bucketed(value, slots, 1.0 - kept.mean() / slots, kept)


def _gate(plan: Plan) -> tuple[Site, Reduction]:
    if not plan.steps or plan.steps[0][0].kind != "before":
        raise ValueError(
            f"encode_in_buckets: plan {plan.name!r} must begin with a gate before a layer, such as "
            "make_plan('mrt5', ...); without one call model.encode."
        )
    site, gate = plan.steps[0]
    if "capacity" not in {field.name for field in dataclasses.fields(gate)}:
        raise ValueError(
            f"encode_in_buckets: {type(gate).__name__} leaves a fixed number of tokens, so that "
            "there is nothing to choose; call model.encode."
        )
    return site, gate


def _sizes(buckets: Sequence[int], n: int) -> list[int]:
    """In ascending order, the full length last."""
    if any(not isinstance(k, int | np.integer) or k < 1 for k in buckets):
        raise ValueError(
            f"encode_in_buckets: buckets={tuple(buckets)} must be counts from 1 on; change them."
        )
    return [*sorted({int(k) for k in buckets if k < n}), n]
