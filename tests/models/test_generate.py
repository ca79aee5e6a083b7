"""Sampling: cached steps equal the full forward pass, whatever the method and the lengths."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.models import Decoder, DecoderConfig
from tokred.models.generate import Generated, Sampling, generate
from tokred.plan import Plan

CONFIG = DecoderConfig(vocab=50, width=32, depth=4, heads=4, kv_heads=2, context=32)
LENGTHS = np.array([9, 5, 2])
PROMPT = jax.random.randint(jax.random.key(1), (3, 9), 0, 50)
RIGHT = jnp.arange(9)[None] < LENGTHS[:, None]
STEPS = 6


def plan_of(name: str, **options) -> Plan:
    return make_plan(name, CONFIG.layout, **options)


PLANS = {
    "dense": plan_of("dense"),
    "mod_aux": plan_of("mod", keep=0.25),
    "mod_predictor": plan_of("mod", keep=0.25, gate="predictor"),
    "mod_all": plan_of("mod", keep=1.0),
}


@functools.cache
def model_of(name: str) -> tuple:
    return nnx.split(Decoder(CONFIG, plan=PLANS[name], rngs=nnx.Rngs(0)))


@functools.cache
def compiled(name: str, **options):
    graph, _ = model_of(name)

    @jax.jit
    def run(state, prompt, valid, key):
        model = nnx.merge(graph, state)
        return generate(
            model, prompt, steps=STEPS, plan=PLANS[name], valid=valid, key=key, **options
        )

    return run


def sample(name: str, prompt=PROMPT, valid=RIGHT, key=None, **options) -> Generated:
    return compiled(name, **options)(model_of(name)[1], prompt, valid, key)


@pytest.mark.parametrize("name", PLANS)
def test_cached_steps_equal_the_full_forward_pass(name: str):
    out, (graph, state) = sample(name), model_of(name)
    plan = PLANS[name].with_twin("causal")
    forward = jax.jit(lambda s, ids, valid: nnx.merge(graph, s)(ids, plan=plan, valid=valid))
    joined = jnp.zeros((3, 9 + STEPS), jnp.int32)
    for row, length in enumerate(LENGTHS):
        whole = jnp.concatenate([PROMPT[row, :length], out.ids[row]])
        joined = joined.at[row, : len(whole)].set(whole)
    valid = jnp.arange(9 + STEPS)[None] < (LENGTHS + STEPS)[:, None]
    logits, report = forward(state, joined, valid)
    for row, length in enumerate(LENGTHS):
        seen = slice(length - 1, length - 1 + STEPS)
        np.testing.assert_allclose(out.logits[row], logits[row, seen], rtol=1e-4, atol=1e-5)
        assert (out.ids[row] == logits[row, seen].argmax(-1)).all()
        for site, entered in out.entered.items():
            read = slice(length, length + STEPS)
            np.testing.assert_array_equal(entered[row], report.aux[site]["entered"][row, read])


def test_the_head_reads_one_token_of_a_prompt():
    """Behind the last valid one, and what comes before costs nothing."""
    config = dataclasses.replace(CONFIG, vocab=4096)
    model = Decoder(config, rngs=nnx.Rngs(0))

    def prefill(model: Decoder, last: bool):
        cache = model.make_cache(3, 12)
        return model.extend(PROMPT, cache, valid=RIGHT, fresh=True, last=last)[0]

    run = nnx.jit(prefill, static_argnames="last")
    whole, alone = run(model, last=False), run(model, last=True)
    assert alone.shape == (3, 1, 4096)
    np.testing.assert_allclose(alone[:, 0], whole[np.arange(3), LENGTHS - 1], atol=1e-5)
    graph, state = nnx.split(model)

    def flops(last: bool) -> float:
        compiled: Any = jax.jit(lambda state: prefill(nnx.merge(graph, state), last)).lower(state)
        return compiled.compile().cost_analysis()["flops"]

    saved = 2 * 3 * (PROMPT.shape[1] - 1) * config.vocab * config.width
    assert flops(False) - flops(True) == pytest.approx(saved, rel=0.05)


def test_capacity_one_is_the_dense_model_bit_for_bit():
    every, dense = sample("mod_all"), sample("dense")
    np.testing.assert_array_equal(every.ids, dense.ids)
    np.testing.assert_array_equal(every.logits, dense.logits)


@pytest.mark.parametrize("name", ["dense", "mod_predictor"])
def test_left_padding_is_right_padding(name: str):
    left = jnp.stack([jnp.roll(row, 9 - n) for row, n in zip(PROMPT, LENGTHS, strict=True)])
    out, other = sample(name), sample(name, left, RIGHT[:, ::-1])
    np.testing.assert_array_equal(out.ids, other.ids)


def test_layers_that_nobody_enters_are_left_out_and_change_nothing():
    out, asked = sample("mod_aux"), sample("mod_aux", skip=False)
    np.testing.assert_array_equal(out.ids, asked.ids)
    np.testing.assert_allclose(out.logits, asked.logits, rtol=1e-5, atol=1e-6)


def test_tokens_that_skip_a_layer_have_no_entry_there():
    out = sample("mod_predictor")
    occupied = out.cache.occupancy()
    assert (occupied[:, 0] == LENGTHS + STEPS).all()
    graph, state = model_of("mod_predictor")
    plan = PLANS["mod_predictor"].with_twin("causal")
    _, report = jax.jit(lambda s: nnx.merge(graph, s)(PROMPT, plan=plan, valid=RIGHT))(state)
    for site in ("around_1", "around_3"):
        prompt = report.aux[site]["entered"].sum(-1)
        layer = int(site[-1])
        assert (occupied[:, layer] == prompt + out.entered[site].sum(-1)).all()
        assert (occupied[:, layer] < occupied[:, 0]).any()


def test_a_row_ends_at_the_end_token():
    free = sample("dense")
    end = int(free.ids[0, 2])
    out = sample("dense", end=end)
    stop = int(np.argmax(np.asarray(free.ids[0]) == end))
    assert out.alive[0].tolist() == [i <= stop for i in range(STEPS)]
    assert (out.ids[0, stop + 1 :] == 0).all()
    assert (out.ids[0, : stop + 1] == free.ids[0, : stop + 1]).all()


def test_draws_come_from_the_key_and_stay_among_the_likeliest():
    hot = Sampling(temperature=1.0, top=3)
    one, same, other = (
        sample("dense", sampling=hot, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    assert (one.ids == same.ids).all() and (one.ids != other.ids).any()
    least = jnp.sort(one.logits, axis=-1)[..., -3]
    chosen = jnp.take_along_axis(one.logits, one.ids[..., None], axis=-1)[..., 0]
    assert (chosen >= least).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 24}, "exceed the context of 32"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": 5, "length": 10}, "length=10 is too short"),
        ({"steps": 2, "sampling": Sampling(temperature=1.0)}, "pass key="),
    ],
)
def test_bad_requests(options: dict, match: str):
    graph, state = model_of("dense")
    with pytest.raises(ValueError, match=match) as error:
        generate(nnx.merge(graph, state), PROMPT, **options)
    assert "\n" not in str(error.value)


def test_decoding_without_a_trained_gate_says_how_to_train_one():
    plan = plan_of("mod", keep=0.25, gate=None)
    model = Decoder(CONFIG, plan=plan, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="gate='aux' or gate='predictor'"):
        generate(model, PROMPT, steps=2, plan=plan)
