"""SkipDecode: its table, and decoding under it without missing keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.methods import around
from tests.methods.around import (
    CONFIG,
    GENERATED,
    IDS,
    PROMPT,
    VALID,
    B,
    N,
    Setting,
    close,
    extend,
    forward,
)
from tokred.methods import make_plan
from tokred.methods.skipdecode import (
    SkipDecode,
    active_layers,
    check_monotone,
    depths_for,
    first_idle,
)
from tokred.tokens import make_tokens

TABLE = np.array([[1, 0, 1, 1]] * 3 + [[1, 0, 0, 1]] * 2, bool)
OPTIONS = {"steps": 5, "most": 3, "least": 2}
MASKED = Setting("skipdecode", OPTIONS, {"generated": GENERATED})
SKIPPING = Setting("skipdecode", {**OPTIONS, "prompt": 15}, {"generated": GENERATED})


def test_table():
    np.testing.assert_array_equal(active_layers(4, 5, 3, 2), TABLE)
    assert first_idle(TABLE) == (None, 0, 3, None)
    assert [site.layer for site, _ in SKIPPING.plan.steps] == [1, 2]


@pytest.mark.parametrize(("most", "least", "warm"), [(24, 8, 1), (9, 3, 2), (32, 32, 0)])
def test_depth_falls_linearly(most, least, warm):
    table = active_layers(32, 101, most, least, warm)
    depth = table.sum(1)
    assert depth[0] == most and depth[-1] == least and table[:, :warm].all()
    close(depth, np.linspace(most, least, 101), atol=0.5)
    assert all((row[warm:] == np.sort(row[warm:])).all() for row in table)  # the upper ones run


def test_depths_for_a_speedup():
    assert depths_for(32, 1) == (32, 32)
    assert depths_for(32, 1.25) == (32, 19)
    assert depths_for(32, 2) == (24, 8)
    assert depths_for(32, 5) == (9, 3)
    assert depths_for(32, 16) == (3, 2)
    table = active_layers(32, 256, *depths_for(32, 2))
    close(table.mean(), 0.5, atol=1e-3)


def test_a_layer_that_comes_back_is_refused():
    with pytest.raises(ValueError, match="layer 1 runs at t=1 but not at t=0"):
        check_monotone(np.array([[True, False], [True, True]]))
    with pytest.raises(ValueError, match="never gets deeper"):
        make_plan("skipdecode", CONFIG.layout, most=2, least=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"most": 9, "least": 2}, "most=9 <= 4"), ({"warm": 3, "least": 3}, "warm=3 < least=3")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan("skipdecode", CONFIG.layout, **options)
    with pytest.raises(ValueError, match=r"speedup=0\.5 must be at least 1"):
        depths_for(12, 0.5)


def test_places_are_needed():
    with pytest.raises(ValueError, match="needs the per-token array 'generated'"):
        SkipDecode(2)(make_tokens(jnp.ones((1, 3, 2))), {})


@jax.jit
def by_hand(model, ids):
    """All layers, each on the tokens that the table lets in."""
    place = jnp.broadcast_to(1.0 * jnp.arange(N), ids.shape)[..., None]
    x, t = model.embed(ids), jnp.clip(GENERATED, 0, 4)
    for layer, block in enumerate(model.blocks):
        enters = jnp.asarray(TABLE)[t, layer]
        tokens = make_tokens(x, position=place).replace(valid=enters & VALID)
        y = x + block.attend(*block.project(tokens), tokens, tokens)
        x = jnp.where(enters[..., None], y + block.feed(y), x)
    return model.embed.attend(model.norm(x))


def test_forward_by_hand():
    close(MASKED.run("causal")[0][VALID], by_hand(MASKED.model, IDS)[VALID])


def test_twins_agree():
    (packed, report), (soft, masked) = SKIPPING.run("packed"), SKIPPING.run("soft")
    close(packed[VALID], soft[VALID])
    assert [count.mlp for count in masked.counts] == [20, 0, 20, 20]
    assert [count.mlp for count in report.counts] == [20, 0, 18, 20]
    assert not report.aux["around_2"]["overflow"].any()


def test_longer_prompts_than_promised_are_counted():
    plan = make_plan("skipdecode", CONFIG.layout, prompt=11, **OPTIONS)
    assert plan.steps[1][1] == SkipDecode(until=3, prompt=11)
    _, report = forward(SKIPPING.model, IDS, VALID, plan=plan, extra={"generated": GENERATED})
    np.testing.assert_array_equal(report.aux["around_2"]["overflow"], PROMPT - 11)


def test_padding_changes_nothing():
    around.check_padding(SKIPPING)


def test_decoding_is_the_forward_pass():
    around.check_decoding(SKIPPING, told=True)


def test_no_key_is_missing():
    """A layer that runs at t holds the prompt and all t + 1 generated tokens."""
    model, plan = SKIPPING.model, SKIPPING.plan.with_twin("causal")
    cache = model.make_cache(B, N, plan=plan)
    assert [layer.capacity for layer in cache.layers] == [20, 1, 18, 20]
    valid = jnp.arange(15)[None] < PROMPT[:, None]
    extra = {"generated": jnp.full((B, 15), -1)}
    _, cache, _ = extend(model, IDS[:, :15], cache, valid, plan=plan, extra=extra, fresh=True)
    for t in range(5):
        extra = {"generated": jnp.full((B, 1), t)}
        _, cache, _ = extend(model, IDS[:, :1], cache, plan=plan, extra=extra)
        runs = np.flatnonzero(TABLE[t])
        held = np.broadcast_to(PROMPT[:, None] + t + 1, (B, len(runs)))
        np.testing.assert_array_equal(cache.occupancy()[:, runs], held)
    assert not cache.occupancy()[:, 1].any()
    assert not any(layer.dropped.any() for layer in cache.layers)


def test_gradients_reach_the_layers_that_run():
    graph, state = nnx.split(SKIPPING.model)

    @jax.jit
    def grads(state, ids):
        def loss(state):
            model = nnx.merge(graph, state)
            logits, _ = model(ids, plan=SKIPPING.plan, valid=VALID, extra={"generated": GENERATED})
            return jnp.where(VALID, jax.nn.log_softmax(logits)[..., 0], 0).mean()

        return jax.grad(loss)(state)

    found = grads(state, IDS)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(found))
    assert not any(g.any() for g in jax.tree.leaves(found["blocks"][1]))
    assert all(g.any() for g in jax.tree.leaves(found["blocks"][2]))


def test_a_mean_depth_of_all_is_dense():
    around.check_dense("skipdecode")
