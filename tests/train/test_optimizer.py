"""The rate by step, what decays, the rate by layer, and the moving average."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokred.train.optimizer import (
    decays,
    ema_decay,
    make_optimizer,
    make_schedule,
    scale_by_layer,
    scale_by_name,
    update_ema,
)

OPTIMIZER = {"lr": 1e-2, "steps": 8, "warmup": 0.25, "weight_decay": 0.1}
SHAPES = {
    "cls": (1, 3),
    "embed/proj/kernel": (4, 3),
    "position": (5, 3),
    "blocks/0/attn/query/kernel": (3, 3),
    "blocks/1/mlp/fc1/bias": (6,),
    "blocks/10/mlp/fc1/kernel": (3, 6),
    "norm/scale": (3,),
    "head/kernel": (3, 2),
    "reductions/mid_1/prune": (5,),
}
DISTANCES = (12, 12, 12, 11, 10, 1, 0, 0, 0)  # of 11 blocks


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}


def trained(tx: Any, steps=5):
    update = jax.jit(tx.update)
    params = arrays(0)
    state = tx.init(params)
    for i in range(steps):
        updates, state = update(arrays(i + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def rates(steps, *schedule) -> Any:
    return [make_schedule(*schedule)(step) for step in steps]


def by_layer(decay, updates) -> Any:
    return jax.jit(scale_by_layer(decay).update)(updates, optax.EmptyState())[0]


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_defaults_are_plain_adamw_behind_a_clip():
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 8)
    adamw = optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=0.1, mask=decays)
    plain = trained(optax.chain(optax.clip_by_global_norm(1.0), adamw))
    ours = trained(make_optimizer(**OPTIMIZER))
    assert same(plain, ours)
    assert jax.tree.structure(plain) == jax.tree.structure(ours)


def test_no_clip_is_a_clip_that_is_never_reached():
    off, far = (trained(make_optimizer(**OPTIMIZER, clip=clip)) for clip in (0.0, 1e9))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), off[0], far[0])
    assert not same(off[0], trained(make_optimizer(**OPTIMIZER))[0])


@pytest.mark.parametrize(("end", "last"), [(0.0, 0.0), (0.25, 0.5), (1.0, 2.0)])
def test_cosine_starts_at_zero_peaks_after_warmup_and_ends(end, last):
    got = rates((0, 2, 4, 7, 10, 99), 2.0, 10, 4, "cosine", end)
    np.testing.assert_allclose(got, [0.0, 1.0, 2.0, (2.0 + last) / 2, last, last], atol=1e-6)


def test_constant_stays():
    got = rates((0, 2, 4, 10), 2.0, 10, 4, "constant")
    np.testing.assert_allclose(got, [0.0, 1.0, 2.0, 2.0])
    assert rates((0,), 2.0, 10, 0, "constant") == [2.0]


def test_a_long_warmup_leaves_one_step_to_fall():
    np.testing.assert_allclose(rates((3, 4), 2.0, 4, 4, "cosine"), [2.0, 0.0], atol=1e-6)


def test_layers_near_the_input_move_less():
    scaled = by_layer(0.5, arrays(0))
    for (name, update), far in zip(arrays(0).items(), DISTANCES, strict=True):
        np.testing.assert_array_equal(scaled[name], update * 0.5**far, err_msg=name)


def test_layer_decay_acts_on_weight_decay_too():
    nothing = jax.tree.map(jnp.zeros_like, arrays(0))
    still = {"lr": 1.0, "steps": 1, "warmup": 0.0, "weight_decay": 0.5, "layer_decay": 0.5}
    tx: Any = make_optimizer(**still)
    updates, _ = tx.update(nothing, tx.init(arrays(0)), arrays(0))
    for (name, weight), far in zip(arrays(0).items(), DISTANCES, strict=True):
        wanted = -weight * 0.5 * 0.5**far if decays(arrays(0))[name] else 0 * weight
        np.testing.assert_allclose(updates[name], wanted, rtol=1e-6, err_msg=name)


def test_layer_decay_counts_only_what_trains():
    some = {name: jnp.ones(2) for name in ("cls", "blocks/2/bias", "head/bias")}
    scaled = by_layer(0.5, some)
    assert [float(scaled[name][0]) for name in some] == [0.5**4, 0.5, 1.0]
    scaled = by_layer(0.5, {"reductions/mid_1/prune": jnp.ones(2)})
    np.testing.assert_array_equal(scaled["reductions/mid_1/prune"], 1.0)


def test_the_first_pattern_that_is_found_scales_an_update():
    tx: Any = scale_by_name((("relative", 20.0), ("decoder", 3.0)))
    names = ("encoder/relative/table", "decoder/relative/table", "decoder/bias", "encoder/bias")
    some = {name: jnp.ones(2, jnp.bfloat16) for name in names}
    scaled, _ = tx.update(some, tx.init(some), some)
    assert [float(scaled[name][0]) for name in names] == [20.0, 20.0, 3.0, 1.0]
    assert {a.dtype for a in scaled.values()} == {jnp.dtype(jnp.bfloat16)}


def test_scales_act_on_a_whole_step():
    changes = []
    for scales in ((), ((r"^blocks/0/", 5.0),)):
        tx: Any = make_optimizer(**OPTIMIZER, scales=scales)
        changes.append(tx.update(arrays(0), tx.init(arrays(0)), arrays(0))[0])
    for name, update in changes[0].items():
        wanted = update * (5.0 if name.startswith("blocks/0/") else 1.0)
        np.testing.assert_allclose(changes[1][name], wanted, rtol=1e-6, err_msg=name)


def test_layer_decay_keeps_dtype_and_adds_no_state():
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), arrays(0))
    scaled = by_layer(0.7, low)
    assert {a.dtype for a in scaled.values()} == {jnp.dtype(jnp.bfloat16)}
    plain, layered = (make_optimizer(**OPTIMIZER, layer_decay=d) for d in (1.0, 0.7))
    leaves = [jax.tree.leaves(tx.init(arrays(0))) for tx in (plain, layered)]
    assert len(leaves[0]) == len(leaves[1])


@pytest.mark.parametrize("change", [{}, {"layer_decay": 0.7, "clip": 0.0, "end": 0.1}])
def test_state_of_abstract_params(change):
    tx: Any = make_optimizer(**OPTIMIZER, **change)
    shapes = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in SHAPES.items()}
    abstract, real = jax.eval_shape(tx.init, shapes), tx.init(arrays(0))
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    assert [a.shape for a in jax.tree.leaves(abstract)] == [a.shape for a in jax.tree.leaves(real)]
    updates, _ = jax.eval_shape(tx.update, shapes, abstract, shapes)
    assert {name: a.shape for name, a in updates.items()} == SHAPES


def test_only_kernels_decay():
    chosen = {name for name, yes in decays(arrays(0)).items() if yes}
    assert chosen == {name for name in SHAPES if name.endswith("kernel")}
    assert not decays({"kernel": jnp.ones(3)})["kernel"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("steps", 0),
        ("warmup", 1.0),
        ("schedule", "no"),
        ("end", 1.5),
        ("b1", 1.0),
        ("b2", -0.1),
        ("weight_decay", -1.0),
        ("clip", -1.0),
        ("layer_decay", 0.0),
        ("layer_decay", 1.1),
        ("lr", float("nan")),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=rf"config\.optimizer\.{field}="):
        make_optimizer(**{**OPTIMIZER, field: value})


def test_a_linear_rate_rises_and_falls():
    told = rates((0, 1, 2, 6, 10, 99), 1.0, 10, 2, "linear", 0.2)
    np.testing.assert_allclose(told, [0, 0.5, 1, 0.6, 0.2, 0.2], rtol=1e-6)
    at_once = rates((0, 5, 10), 1.0, 10, 0, "linear")
    np.testing.assert_allclose(at_once, [1, 0.5, 0], atol=1e-6)


def test_a_constant_rate_has_no_end():
    with pytest.raises(ValueError, match=r"config\.optimizer\.end=0\.5 .*'constant'"):
        make_optimizer(**OPTIMIZER, schedule="constant", end=0.5)


def test_ema_decay_grows_to_its_own():
    steps = [0, 1, 90, 10**6]
    wanted = [1 / 10, 2 / 11, 91 / 100, 0.999]
    got = [jax.jit(ema_decay, static_argnums=0)(0.999, jnp.int32(step)) for step in steps]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    np.testing.assert_allclose([ema_decay(0.999, step) for step in steps], wanted, rtol=1e-6)
    assert got[0].dtype == jnp.float32


def test_ema_by_hand():
    ema, params = arrays(0), arrays(1)
    new = jax.jit(update_ema)(ema, params, ema_decay(0.75, 10**4))
    for name in SHAPES:
        np.testing.assert_allclose(new[name], 0.75 * ema[name] + 0.25 * params[name], rtol=1e-5)


def test_ema_keeps_its_paths_dtype_and_what_rests():
    ema = {"cls": arrays(0)["cls"], "position": arrays(0)["position"].astype(jnp.bfloat16)}
    params = {**arrays(1), "cls": ema["cls"]}
    new = update_ema(ema, params, 0.3)
    assert list(new) == list(ema) and new["position"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(new["cls"], ema["cls"])
    wanted = 0.3 * ema["position"].astype(jnp.float32) + 0.7 * params["position"]
    np.testing.assert_array_equal(new["position"], wanted.astype(jnp.bfloat16))
