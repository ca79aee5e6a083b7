"""Tokens on small grids, and one reduction run on them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokred.maps import TokenMap
from tokred.nn.embeddings import grid_positions
from tokred.plan import Layout, Reduction
from tokred.tokens import Tokens, make_tokens

BATCH, WIDTH = 2, 8


def layout_of(grid: tuple[int, int], prefix: int = 0, width: int = WIDTH) -> Layout:
    return Layout(1, prefix + grid[0] * grid[1], prefix, grid, prefix > 0, width, 2)


LAYOUT = layout_of((4, 4), prefix=2)


def tokens_of(layout: Layout, valid: Any = None) -> Tokens:
    x = jax.random.normal(jax.random.key(1), (BATCH, layout.tokens, layout.width))
    place = np.concatenate([np.full((layout.prefix, 2), -1.0), grid_positions(layout.grid)])
    place = jnp.asarray(place[: layout.tokens], jnp.float32)
    place = jnp.broadcast_to(place, (BATCH, *place.shape))
    return make_tokens(x, valid=valid, position=place, prefix=layout.prefix)


def perturbed(module: Any, spread: float = 0.3) -> Any:
    """Weights of norms and biases that matter, too."""
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [a + spread * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved))


def module_of(reduction: Reduction, width: int = WIDTH) -> Any:
    module = reduction.build(width, 2, nnx.Rngs(0))
    return None if module is None else perturbed(module)


def run(reduction: Reduction, tokens: Tokens) -> tuple[Tokens, TokenMap]:
    """(tokens, map) with a module of fixed weights."""
    module = module_of(reduction, tokens.x.shape[-1])
    reduced = jax.jit(lambda tokens, module: reduction(tokens, {}, module=module)[:2])
    return reduced(tokens, module)
