"""A prompt that is read once, and what any plan keeps of it.

Methods for the cache act when the prompt has been read as a whole: up to then they are alike.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokred.cache import CacheReduction, KVCache, LayerCache, Look, cache_reduction
from tokred.models import Decoder
from tokred.nn.skeleton import split_model
from tokred.plan import Plan, Site


@dataclass(frozen=True)
class Recorder(CacheReduction):
    """Keeps all of a prompt, and its queries in `extra`."""

    def room(self, prompt: int, length: int, layer: int, depth: int) -> int:
        return prompt

    def begin(self, cache: LayerCache, look: Look) -> LayerCache:
        return replace(cache, extra=look.q)


RECORD = Plan(((Site("cache"), Recorder()),), name="record")


@dataclass(frozen=True)
class Prompts:
    """What reading leaves: logits [B V] behind each prompt, and all keys, values and queries."""

    logits: Float[Array, "B V"]
    cache: KVCache

    @property
    def rows(self) -> int:
        return self.logits.shape[0]

    @property
    def length(self) -> int:
        return self.cache.layers[0].capacity


def read_prompts(model: Decoder, ids: Int[np.ndarray, "B N"]) -> Prompts:
    """All rows at once."""
    skeleton, weights = split_model(model)

    def read(params: Any, rest: Any, ids: Array) -> tuple[Array, KVCache]:
        model = skeleton.merge(params, rest)
        cache = model.make_cache(*ids.shape, plan=RECORD)
        logits, cache, _ = model.extend(ids, cache, plan=RECORD, fresh=True)
        return logits[:, -1], cache

    return Prompts(*jax.jit(read)(*weights, jnp.asarray(ids)))


def keep(model: Decoder, prompts: Prompts, plan: Plan, steps: int) -> KVCache:
    """The cache as `Decoder.extend` leaves it when it reads these prompts under the plan, with room
    for `steps` (static) tokens more.

    Raises:
      ValueError: fewer entries than the plan's method always keeps.
    """
    whole, n = prompts.cache, prompts.length
    empty = model.make_cache(prompts.rows, n + steps, plan=plan, prompt=n)
    pairs = zip(whole.layers, empty.layers, strict=True)
    layers = [_kept(model, plan, each, slots, i) for i, (each, slots) in enumerate(pairs)]
    return empty.advance(layers, whole.seen)


def _kept(
    model: Decoder, plan: Plan, whole: LayerCache, slots: LayerCache, layer: int
) -> LayerCache:
    block, how = model.blocks[layer], cache_reduction(plan)
    place = whole.position[:, 0]
    look = Look(whole.extra, place, block.weigh, block.rates, layer, len(model.blocks))
    whole = replace(whole, extra=None, extent=slots.extent)
    if slots.raw:
        swap = lambda k: jnp.swapaxes(k, 1, 2)  # noqa: E731
        whole = replace(whole, k=swap(block.unplace(swap(whole.k), place)), raw=True)
    return how.rest(whole, look, slots.capacity)


def kept_bytes(model: Decoder, prompts: Prompts, plan: Plan) -> int:
    """Of what a plan keeps of one prompt, with room for one token more; not computed."""
    first = jax.tree.map(lambda a: a[:1], (prompts.logits, prompts.cache))
    return jax.eval_shape(lambda p: keep(model, Prompts(*p), plan, 1), first).nbytes()
