"""Random maps with fixed shapes, so that a property draws seeds and compiles once."""

import jax.numpy as jnp
import numpy as np

from tokred.maps import Assign, Keep, Mix, TokenMap

KINDS = ("keep", "assign", "weighted", "several", "joined", "mix")


def make_map(
    kind: str, rng: np.random.Generator, lead: tuple[int, ...], n: int, k: int, valid: bool
) -> TokenMap:
    """A map of `kind` from n to k tokens; Assign leaves some tokens out, some groups empty (not
    where it tells who joins the others)."""
    alive = jnp.asarray(rng.random((*lead, k)) < 0.7) if valid else None
    if kind == "keep":
        index = rng.random((*lead, n)).argsort(-1)[..., :k]
        return Keep(jnp.asarray(index, jnp.int32), n, alive)
    if kind == "mix":
        return Mix(normal(rng, *lead, k, n), alive)
    if kind == "joined":
        order = rng.random((*lead, n)).argsort(-1)
        into = rng.integers(0, k + 1, (*lead, n - k))
        target = np.empty((*lead, n), int)
        slots = np.concatenate([np.broadcast_to(np.arange(k), (*lead, k)), into], -1)
        np.put_along_axis(target, order, slots, -1)
        weight = jnp.asarray(rng.random((*lead, n)) + 0.1, jnp.float32)
        index, joining, target = (
            jnp.asarray(a, jnp.int32) for a in (order[..., :k], order[..., k:], target)
        )
        return Assign(target, k, weight, index, alive, joining=joining)
    shape = (*lead, n, 3) if kind == "several" else (*lead, n)
    weight = None if kind == "assign" else jnp.asarray(rng.random(shape) + 0.1, jnp.float32)
    target = jnp.asarray(rng.integers(0, k + 1, shape), jnp.int32)
    index = jnp.asarray(rng.integers(0, n, (*lead, k)), jnp.int32)
    return Assign(target, k, weight, index, alive, several=kind == "several")


def normal(rng: np.random.Generator, *shape: int):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)
