"""Random maps with fixed shapes, so that a property draws seeds and compiles once."""

import jax.numpy as jnp
import numpy as np

from tokred.maps import Assign, Keep, Mix, TokenMap

KINDS = ("keep", "assign", "weighted", "several", "mix")


def make_map(
    kind: str, rng: np.random.Generator, lead: tuple[int, ...], n: int, k: int, valid: bool
) -> TokenMap:
    """A map of `kind` from n to k tokens; Assign leaves some tokens out, some groups empty."""
    alive = jnp.asarray(rng.random((*lead, k)) < 0.7) if valid else None
    if kind == "keep":
        index = rng.random((*lead, n)).argsort(-1)[..., :k]
        return Keep(jnp.asarray(index, jnp.int32), n, alive)
    if kind == "mix":
        return Mix(normal(rng, *lead, k, n), alive)
    shape = (*lead, n, 3) if kind == "several" else (*lead, n)
    weight = None if kind == "assign" else jnp.asarray(rng.random(shape) + 0.1, jnp.float32)
    target = jnp.asarray(rng.integers(0, k + 1, shape), jnp.int32)
    index = jnp.asarray(rng.integers(0, n, (*lead, k)), jnp.int32)
    return Assign(target, k, weight, index, alive, several=kind == "several")


def normal(rng: np.random.Generator, *shape: int):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)
