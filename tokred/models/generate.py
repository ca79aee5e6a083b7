"""Sampling from decoders: prefill, then steps under one scan, all with static shapes."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokred.cache import KVCache
from tokred.ops import top_k
from tokred.plan import Plan
from tokred.report import Call

DENSE = Plan()


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; static. temperature 0: the likeliest. top: among so many of the
    likeliest, 0 for all."""

    temperature: float = 0.0
    top: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top < 0:
            raise ValueError(
                f"Sampling: temperature={self.temperature} and top={self.top} must not be "
                "negative; change them."
            )

    def __call__(self, logits: Float[Array, "B V"], key: Any) -> Int[Array, " B"]:
        """One token each. Raises ValueError where a draw has no key."""
        if self.temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        if key is None:
            raise ValueError("Sampling: temperature > 0 draws tokens; pass key= to generate.")
        if self.top:
            least = top_k(logits, self.top)[0][..., -1:]
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return jax.random.categorical(key, logits / self.temperature).astype(jnp.int32)


class Generated(NamedTuple):
    """ids: Int[B steps], 0 after the end · alive: Bool[B steps], up to the end token · logits:
    Float[B steps V] that each was drawn from · entered: by site, Bool[B steps], whether the token
    went into the layer when it was read (the last one is not) · cache: as the last step left it;
    `cache.layers[i].dropped` counts tokens that found no slot · watched: [B steps ...], what was
    watched after every step."""

    ids: Array
    alive: Array
    logits: Array
    entered: Mapping[str, Array]
    cache: KVCache
    watched: Any = None


def generate(
    model: Any,
    prompt: Int[Array, "B N"],
    *,
    steps: int,
    plan: Plan = DENSE,
    prefill: str = "causal",
    valid: Bool[Array, "B N"] | None = None,
    extra: dict[str, Array] | None = None,
    sampling: Sampling | None = None,
    key: PRNGKeyArray | None = None,
    end: int | None = None,
    length: int | None = None,
    skip: bool = True,
    watch: Callable[[KVCache], Any] | None = None,
) -> Generated:
    """Continues prompts of different lengths (`valid`, padded on either side) by `steps` tokens.

    model: a `Decoder`, or a `Conditioned` one, whose prompts begin with `encoder_decoder.START`.

    Steps run under the plan's causal twin: each token decides alone which layers it enters, and has
    an entry in their caches alone. prefill: the twin for the prompt, 'causal', or 'packed' where
    choosing among all of a prompt's tokens is what is meant. extra: per-token arrays of the prompt
    that reductions read; generated tokens have zeros, and 'generated' counts them (prompt: -1).
    end: the token that ends a row. length: slots of the cache, default prompt and steps. skip:
    leave out a layer that no row enters. watch: what to keep of the cache after every step, arrays
    [B ...]; such as `lambda cache: cache.entries(heads)`. Static: steps, plan, prefill, sampling,
    end, length, skip, watch.

    Raises:
      ValueError: more tokens than the context or the cache holds, a plan without a trained gate, or
        draws without a key.
    """
    n, sampling = prompt.shape[1], sampling or Sampling()
    length = _check_length(model, n, steps, length)
    cache = model.make_cache(prompt.shape[0], length, plan=plan, prompt=n)
    extra = {**(extra or {}), "generated": jnp.full(prompt.shape, -1, jnp.int32)}
    logits, cache, _ = model.extend(
        prompt,
        cache,
        plan=plan.with_twin(prefill),
        call=Call(key=_fold(key, 0)),
        valid=valid,
        extra=extra,
        fresh=True,
        last=True,
    )
    take = functools.partial(
        _step, model, plan.with_twin("causal"), extra, sampling, key, end, skip, watch
    )
    alive = jnp.ones((prompt.shape[0],), bool)
    (cache, _, _), told = jax.lax.scan(take, (cache, logits[:, 0], alive), jnp.arange(steps))
    ids, lives, drawn, entered, watched = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), told)
    return Generated(ids, lives, drawn, entered, cache, watched)


def _step(
    model: Any,
    plan: Plan,
    extra: Mapping[str, Array],
    sampling: Sampling,
    key: Any,
    end: int | None,
    skip: bool,
    watch: Callable[[KVCache], Any] | None,
    carry: tuple[KVCache, Array, Array],
    step: Array,
) -> tuple[tuple[KVCache, Array, Array], tuple[Array, Array, Array, dict[str, Array], Any]]:
    """Draws a token from the logits so far and reads it."""
    cache, logits, alive = carry
    ids = jnp.where(alive, sampling(logits, _fold(key, 2 * step + 1)), 0)
    mine = {name: jnp.zeros((len(ids), 1, *a.shape[2:]), a.dtype) for name, a in extra.items()}
    mine["generated"] = jnp.broadcast_to(step, (len(ids), 1)).astype(jnp.int32)
    following, cache, report = model.extend(
        ids[:, None],
        cache,
        plan=plan,
        call=Call(key=_fold(key, 2 * step + 2), skip=skip),
        valid=None if end is None else alive[:, None],
        extra=mine,
    )
    goes_on = alive if end is None else alive & (ids != end)
    told = {site: seen[:, 0] for site, seen in report.entered.items()}
    watched = None if watch is None else watch(cache)
    return (cache, following[:, 0], goes_on), (ids, alive, logits, told, watched)


def _fold(key: Any, number: int | Array) -> Any:
    return None if key is None else jax.random.fold_in(key, number)


def _check_length(model: Any, n: int, steps: int, length: int | None) -> int:
    context = model.config.context
    if steps < 1:
        raise ValueError(f"generate: steps={steps} must be at least 1; raise steps.")
    if n + steps > context:
        raise ValueError(
            f"generate: a prompt of {n} and {steps} steps exceed the context of {context}; shorten "
            "one of them or raise DecoderConfig.context."
        )
    if length is not None and length < n + steps:
        raise ValueError(
            f"generate: a cache of length={length} is too short for a prompt of {n} and {steps} "
            f"steps; give it {n + steps} or leave it out."
        )
    return length or n + steps
