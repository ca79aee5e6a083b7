"""LookupViT: its blocks by hand, where compressed tokens begin, one set of weights for any side."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.cost import macs
from tokred.methods import make_plan
from tokred.methods.lookupvit import Compress, Lookup, ReadOut, lookupvit
from tokred.methods.nested_dropout import NestedDropout
from tokred.models import ViT, ViTConfig, VLMConfig, vit_config
from tokred.nn.lookup import LookupAttention
from tokred.plan import Plan, Site
from tokred.tokens import Tokens, make_tokens

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
CONFIG = ViTConfig(image_size=(16, 16), patch=(4, 4), width=16, depth=3, heads=2, classes=5)
IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
GRID, N, P = (4, 4), 16, 1


@functools.cache
def model_of(**options) -> ViT:
    """Its biases and norms are not those of the start."""
    config = options.pop("config", CONFIG)
    plan = lookupvit(config.layout, **options)
    graph, state = nnx.split(nnx.jit(lambda: ViT(config, plan=plan, rngs=nnx.Rngs(0)))())
    draw = lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(draw, state))


def run(model: ViT, plan: Plan, images=IMAGES, valid=None):
    graph, state = nnx.split(model)
    forward = lambda s, x, v: nnx.merge(graph, s)(x, plan=plan, valid=v)  # noqa: E731
    return jax.jit(forward)(state, images, valid)


def heads_of(linear: nnx.Linear, x: jax.Array) -> list[jax.Array]:
    return jnp.split(linear(x), CONFIG.heads, axis=-1)


def layer_by_hand(
    model: ViT, layer: int, x: jax.Array, lookup: jax.Array, gives: bool, renorm: bool
):
    """One example: x [P + M, D] of the block, lookup [N, D]."""
    own, block = model.reductions[f"around_{layer}"], model.blocks[layer]
    seen = own.norm_key(lookup)
    q, k, v = (
        heads_of(linear, a)
        for linear, a in ((own.query, own.norm_query(x[P:])), (own.key, seen), (own.value, seen))
    )
    share = [jax.nn.softmax(a @ b.T / a.shape[-1] ** 0.5, -1) for a, b in zip(q, k, strict=True)]
    taken = jnp.concatenate([a @ b for a, b in zip(share, v, strict=True)], -1)
    x = jnp.concatenate([x[:P], x[P:] + own.out(taken)])
    tokens = make_tokens(x[None])
    x = x + block.attend(*block.project(tokens), tokens, tokens)[0]
    x = x + block.feed(x)
    if gives:
        back = [a / (a.sum(0, keepdims=True) + 1e-6) for a in share] if renorm else share
        values = heads_of(own.value_back, own.norm_back(x[P:]))
        given = jnp.concatenate([a.T @ b for a, b in zip(back, values, strict=True)], -1)
        lookup = lookup + own.out_back(given)
        lookup = lookup + own.mlp(own.norm_feed(lookup))
    return x, lookup


def by_hand(model: ViT, cells: tuple[int, int], both: bool = False, renorm: bool = False):
    tokens, out = model.tokens(IMAGES), []
    for x in tokens.x:
        lookup = x[P:]
        small = jax.image.resize(lookup.reshape(*GRID, -1), (*cells, 16), "linear", antialias=False)
        x = jnp.concatenate([x[:P], small.reshape(-1, 16)])
        for layer in range(CONFIG.depth):
            gives = both or layer < CONFIG.depth - 1
            x, lookup = layer_by_hand(model, layer, x, lookup, gives, renorm)
        out.append(jnp.concatenate([x[:P], lookup, x[P:]]) if both else x)
    return model.norm(jnp.stack(out))


@pytest.mark.parametrize(
    "options", [{"side": 2}, {"side": 3, "output": "both", "renorm": True}, {"keep": 1.0}]
)
def test_forward_by_hand(options):
    model, plan = model_of(**options), lookupvit(CONFIG.layout, **options)
    logits, report = run(model, plan)
    side = options.get("side", 4)
    both, renorm = "output" in options, options.get("renorm", False)
    wanted = jax.jit(lambda m: by_hand(m, (side, side), both, renorm))(model)
    close(report.tokens.x, wanted)
    assert model.head is not None
    close(logits, model.head(wanted[:, 0]))
    assert {count.queries for count in report.counts} == {P + side**2}
    assert {count.out for count in report.counts} == {P + N + side**2}


def test_weights_know_no_side():
    """Built for one, run with any."""
    one, other = (nnx.split(model_of(side=side)) for side in (2, 4))
    assert one[0] == other[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
    logits = []
    for side in (1, 2, 3, 4):
        plan = lookupvit(CONFIG.layout, side=side)
        logits.append(run(model_of(side=2), plan)[0])
        close(logits[-1], run(model_of(side=side), plan)[0])
    assert all(np.abs(a - b).max() > 1e-4 for a, b in itertools.pairwise(logits))


def tokens_of(grid, valid=None) -> Tokens:
    n = grid[0] * grid[1]
    x = jax.random.normal(jax.random.key(1), (2, P + n, 6))
    place = jnp.stack(jnp.meshgrid(*map(jnp.arange, grid), indexing="ij"), -1).reshape(n, 2)
    place = jnp.concatenate([-jnp.ones((P, 2)), place])
    place = jnp.broadcast_to(place, (2, *place.shape))
    return make_tokens(x, position=place, prefix=P, valid=valid)


@pytest.mark.parametrize(("grid", "cells"), [((4, 6), (2, 3)), ((7, 5), (3, 2)), ((3, 3), (3, 3))])
def test_compressed_tokens_begin_as_a_resized_grid(grid, cells):
    tokens, n = tokens_of(grid), P + grid[0] * grid[1]
    out, map_, _, _ = Compress(grid, cells)(tokens, {})
    np.testing.assert_array_equal(out.x[:, :n], tokens.x)
    image = out.x[:, P:n].reshape(2, *grid, 6)
    small = jax.image.resize(image, (2, *cells, 6), "linear", antialias=False)
    close(out.x[:, n:], small.reshape(2, -1, 6))
    middle = [(np.arange(k) + 0.5) * m / k - 0.5 for m, k in zip(grid, cells, strict=True)]
    places = np.stack(np.meshgrid(*middle, indexing="ij"), -1).reshape(-1, 2)
    close(out.position[:, n:], np.broadcast_to(places, (2, *places.shape)))
    np.testing.assert_array_equal(out.sources(), np.tile(np.arange(n), (2, 1)))
    np.testing.assert_array_equal(out.sizes(), [[1] * n + [0] * len(places)] * 2)
    assert map_ is not None and map_.k == out.n and out.prefix == P


def test_padding_is_left_out_of_the_start():
    valid = jnp.ones((2, P + 16), bool).at[0, P + 8 :].set(False).at[1, P].set(False)
    tokens = tokens_of(GRID, valid)
    out, _, _, _ = Compress(GRID, (2, 2))(tokens, {})
    np.testing.assert_array_equal(out.valid[:, 17:], [[1, 1, 0, 0], [1] * 4])
    assert not out.x[0, 19:].any() and (out.position[0, 19:] == -1).all()
    close(out.x[1, 17], tokens.x[1, [P + 1, P + 4, P + 5]].mean(0))
    left, _, _, _ = ReadOut(GRID, (2, 2))(out, {})
    np.testing.assert_array_equal(left.x, out.x[:, [0, *range(17, 21)]])
    np.testing.assert_array_equal(left.sizes(), [[1, 4, 4, 0, 0], [1, 3, 4, 4, 4]])
    np.testing.assert_array_equal(left.position, out.position[:, [0, *range(17, 21)]])
    assert left.n == 5


def test_padding_gives_nothing_back():
    """Neither a lookup token nor a compressed one, whatever they hold."""
    valid = jnp.ones((2, P + 16), bool).at[:, P + 8 :].set(False)
    tokens, _, _, _ = Compress(GRID, (2, 2))(tokens_of(GRID, valid), {})
    around = Lookup(GRID, (2, 2))
    module = around.build(6, 2, nnx.Rngs(0))
    seen = []
    for garbage in (0.0, 9.0):
        here = tokens.replace(x=jnp.where(tokens.valid[..., None], tokens.x, garbage))
        entered, map_, _, aux = around(here, {}, module=module)
        np.testing.assert_array_equal(entered.valid, [[1, 1, 1, 0, 0]] * 2)
        after = aux["combine"].put_back(here.x, entered.x, entered.x, map_)
        seen.append(after[tokens.valid])
    np.testing.assert_array_equal(*seen)
    changed = np.abs(seen[0] - tokens.x[tokens.valid]).max(-1) > 1e-3
    assert changed.sum() == len(changed) - 2 * P


def test_what_is_left_stands_for_its_part_of_the_grid():
    _, report = run(model_of(side=2), lookupvit(CONFIG.layout, side=2))
    cell = np.kron([[1, 2], [3, 4]], np.ones((2, 2), int)).reshape(-1)
    np.testing.assert_array_equal(report.tokens.sources(), [[0, *cell]] * 2)
    np.testing.assert_array_equal(report.restore(report.tokens.x)[:, 1], report.tokens.x[:, 1])


def test_weights_of_the_way_back():
    """They sum to M / N on average, or to one each."""
    few, x = jnp.split(jax.random.normal(jax.random.key(2), (2, 12, 8)), [3], axis=1)
    given = {}
    for renorm in (False, True):
        own: Any = LookupAttention(8, 2, 4, renorm=renorm, rngs=nnx.Rngs(0))
        _, weights = own.gather(few, x)
        close(weights.sum(-1), np.ones((2, 2, 3)))
        own.value_back.kernel[...] = jnp.zeros((8, 8))
        own.value_back.bias[...] = jnp.ones(8)
        own.out_back.kernel[...] = jnp.eye(8)
        own.mlp.fc2.kernel[...] = jnp.zeros((4, 8))
        given[renorm] = own.give(x, few, weights) - x
    close(given[False].mean(1), np.full((2, 8), 3 / 9))
    close(given[True], np.ones((2, 9, 8)))
    assert given[False].std() > 1e-3


@pytest.mark.parametrize("output", ["compressed", "both"])
def test_all_weights_learn(output):
    """The last layer's way back has none where nobody reads it."""
    config = dataclasses.replace(CONFIG, class_token=False, pool="mean")
    plan = lookupvit(config.layout, side=2, output=output)
    graph, state = nnx.split(model_of(config=config, side=2, output=output))
    loss = lambda s: nnx.merge(graph, s)(IMAGES, plan=plan)[0].var()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(state)
    flat = jax.tree_util.tree_leaves_with_path(grads["reductions"])
    assert all(g.any() for _, g in flat)
    assert ("mlp" in grads["reductions"]["around_2"]) == (output == "both")


def test_cost_is_that_of_the_formula():
    config = vit_config("vit_b16", class_token=False, pool="mean", classes=0)
    n, d, depth = 196, 768, 12
    for side in (3, 5, 7, 10):
        m = side**2
        layer = 4 * n * d**2 + 15 * m * d**2 + 3 * n * m * d + 2 * m * m * d
        last = (n + m) * d**2 + n * m * d + n * d**2  # the way back and its perceptron
        outer = n * 16 * 16 * 3 * d + n * m * d
        plan = make_plan("lookupvit", config.layout, side=side)
        assert macs(config, plan) == depth * layer - last + outer


def test_a_vision_language_model_reads_the_compressed_tokens():
    config = VLMConfig(vision=dataclasses.replace(CONFIG, classes=0), feature_layer=2)
    plan = lookupvit(config.layout, side=3).within("vision")
    assert config.image_tokens(plan) == 9


def test_a_plan_grows_only_where_it_says_so():
    @dataclasses.dataclass(frozen=True)
    class Hidden(Compress):
        grows = False

    steps = (Site("input"), Compress(GRID, (2, 2))), (Site("input"), Hidden(GRID, (2, 2)))
    assert Plan(steps[:1]).counts(CONFIG.layout)[0].queries == P + N + 4
    with pytest.raises(ValueError, match=r"would leave 21 of 17 tokens .* in \[2, 17\]"):
        Plan(steps[1:]).counts(CONFIG.layout)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"side": 5}, r"side=5 must lie in \[1, 4\], as grid=\(4, 4\) allows"),
        ({"side": 0}, r"side=0 must lie in \[1, 4\]"),
        ({"output": "all"}, "output='all' must be one of"),
        ({"hidden": 0}, "hidden=0 must be above 0"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match) as error:
        make_plan("lookupvit", CONFIG.layout, **options)
    assert "\n" not in str(error.value)


def test_no_other_token_may_come_or_go():
    pruned = Plan(((Site("before", 1), NestedDropout(4, 2)),), name="cut")
    with pytest.raises(ValueError, match=r"expected 16 tokens of grid=\(4, 4\) and 4 of cells="):
        (pruned + lookupvit(CONFIG.layout, side=2)).counts(CONFIG.layout)
    with pytest.raises(ValueError, match="build it with plan="):
        run(ViT(CONFIG, rngs=nnx.Rngs(0)), lookupvit(CONFIG.layout))
    with pytest.raises(ValueError, match="heads=3 must divide the width 16"):
        Lookup(GRID, (2, 2)).build(16, 3, nnx.Rngs(0))
