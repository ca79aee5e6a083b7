"""A reduction by itself: compiled or not, with padding or without."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tests.conformance.models import BATCH, MODELS, extra_at
from tests.conformance.setting import KEY
from tests.methods_table import Row
from tokred.evidence import Seen, provide
from tokred.methods import get_method, make_plan
from tokred.plan import AROUND, Ask, Layout, Reduction, Site
from tokred.tokens import Tokens, make_tokens


def layout_of(row: Row, grid: tuple[int, int], prefix: int) -> Layout:
    layout = MODELS[row.model].even.layout
    if layout.grid[0] == 1:  # a sequence
        grid = (1, grid[0] * grid[1])
    return dataclasses.replace(layout, grid=grid, prefix=prefix, tokens=prefix + grid[0] * grid[1])


def step_of(row: Row, layout: Layout) -> tuple[Site, Reduction]:
    """A site of the plan and its reduction, sized for its tokens where it counts them."""
    if get_method(row.method).family == "skip":
        return make_plan(row.method, layout, **row.easy).steps[-1]
    options = {"keep": 8 / (layout.tokens - layout.prefix)}
    options = row.easy if "images" in row.easy else options  # it pools what they say
    site, reduction = make_plan(row.method, layout, **options).steps[0]
    return site, reduction if row.padding is None else row.padding(layout)


@functools.cache
def router(reduction: Reduction) -> Any:
    with jax.ensure_compile_time_eval():
        return reduction.build(16, 2, nnx.Rngs(0))


def tokens_of(row: Row, n: int, prefix: int, padded: int = 0) -> Tokens:
    """`n` random tokens and `padded` rows of NaN behind, which leave garbage in later layers."""
    x = jax.random.normal(jax.random.key(1), (2, n, 16))
    tail = jnp.full((2, padded, 16), jnp.nan)
    valid = jnp.concatenate([jnp.ones((2, n), bool), jnp.zeros((2, padded), bool)], 1)
    place = jnp.broadcast_to(jnp.arange(n + padded), (BATCH, n + padded))
    known = {
        "position": place[:2, :, None].astype(jnp.float32),
        "extra": {name: value[:2] for name, value in extra_at(row.extra, place).items()},
        "prefix": prefix,
    }
    if not padded:
        return make_tokens(x, **known)
    tokens = make_tokens(jnp.concatenate([x, tail], 1), valid=valid, **known)
    garbage = 9 * jax.random.normal(jax.random.key(2), tokens.x.shape)
    return tokens.replace(x=jnp.where(valid[..., None], tokens.x, garbage))


@functools.partial(jax.jit, static_argnums=0)
def reduce_compiled(reduction: Reduction, tokens: Tokens) -> tuple[Tokens, Any]:
    return reduce_tokens(reduction, tokens)


def reduce_tokens(reduction: Reduction, tokens: Tokens) -> tuple[Tokens, Any]:
    """(tokens, map) of one reduction with evidence from fixed projections."""
    evidence = {ask.name: _evidence(ask, tokens) for ask in reduction.asks}
    module = router(reduction)
    out, map_, _, _ = reduction(tokens, evidence, reduction.init(), module=module, key=KEY)
    return out, map_


def _evidence(ask: Ask, tokens: Tokens) -> Array:
    if ask.kind == "normed":
        return tokens.x / jnp.linalg.norm(tokens.x, axis=-1, keepdims=True)
    if ask.kind == "experts":
        return tokens.x[..., :3]
    if ask.kind == "cached":
        return jnp.zeros(tokens.x.shape[:2], jnp.int32)
    kernels = jax.random.normal(jax.random.key(4), (3, 16, 2, 8)) / 4
    q, k, v = jnp.einsum("bnd,cdhe->cbnhe", tokens.x, kernels)
    return provide(ask, Seen(q, k, v, tokens.x, tokens))


def check_jit_is_no_jit(row: Row) -> None:
    prefix = MODELS[row.model].odd.layout.prefix
    site, reduction = step_of(row, layout_of(row, (4, 4), prefix))
    tokens = tokens_of(row, 16 + prefix, prefix)
    plain, jitted = reduce_tokens(reduction, tokens), reduce_compiled(reduction, tokens)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(same, plain, jitted)
    if site.kind not in AROUND:
        np.testing.assert_array_equal(jitted[0].x[:, :prefix], tokens.x[:, :prefix])


def check_padding_changes_no_choice(row: Row) -> None:
    """Tokens and 8 padded rows against the tokens alone, with the model's prefix and a longer."""
    first = MODELS[row.model].odd.layout.prefix
    for prefix in {first, 3 * first}:
        n = 16 + prefix
        _, reduction = step_of(row, layout_of(row, (4, 4), prefix))
        short, short_map = reduce_compiled(reduction, tokens_of(row, n, prefix))
        padded = step_of(row, layout_of(row, (6, 4), prefix))[1]
        out, map_ = reduce_compiled(padded, tokens_of(row, n, prefix, padded=8))
        for i in range(2):
            alive = np.asarray(out.valid[i])
            own = slice(None) if short.valid is None else np.asarray(short.valid[i])
            np.testing.assert_allclose(out.x[i][alive], short.x[i][own], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(out.sizes()[i][alive], short.sizes()[i][own], rtol=1e-5)
        gone = np.asarray(map_.source[:, :n]) < 0
        np.testing.assert_array_equal(gone, np.asarray(short_map.source) < 0)
        assert (np.asarray(out.sources())[:, n:] == -1).all()
