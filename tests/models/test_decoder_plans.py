"""Encoder-decoders under plans of both stacks: a delete gate before, Mixture-of-Depths behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred import cost
from tokred.methods import make_plan
from tokred.models import Conditioned, EncoderDecoder, EncoderDecoderConfig
from tokred.models.generate import generate
from tokred.plan import Plan
from tokred.report import Call

CONFIG = EncoderDecoderConfig(
    vocab=40, width=32, depth=3, decoder_depth=3, heads=2, head_dim=8, hidden=48, context=24,
    target_context=16,
)  # fmt: skip
IDS = jax.random.randint(jax.random.key(0), (3, 24), 3, CONFIG.vocab)
TARGET = jax.random.randint(jax.random.key(1), (3, 16), 3, CONFIG.vocab).at[:, 0].set(0)


def depths() -> Plan:
    return make_plan("mod", CONFIG.decoder_layout(), keep=0.5, gate="predictor")


def both() -> Plan:
    return make_plan("mrt5", CONFIG.layout, keep=0.5, layer=1, corrected=True) + depths()


@pytest.fixture(scope="module")
def model() -> EncoderDecoder:
    return EncoderDecoder(CONFIG, plan=both(), rngs=nnx.Rngs(0))


def run(model: EncoderDecoder, plan: Plan):
    return jax.jit(lambda m: m(IDS, TARGET, plan=plan, call=Call(key=jax.random.key(2))))(model)


def named(model: EncoderDecoder) -> dict[str, jax.Array]:
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): leaf[...] for path, leaf in leaves}


def test_weights_are_those_of_the_dense_model(model):
    mine, its = named(model), named(EncoderDecoder(CONFIG, rngs=nnx.Rngs(0)))
    learned = {name for name in mine if "reductions/" in name}
    assert {name.split("reductions/")[0] for name in learned} == {"", "decoder/"}
    assert its.keys() == mine.keys() - learned
    for name, leaf in its.items():
        np.testing.assert_array_equal(leaf, mine[name])


def test_both_stacks_report(model):
    _, report = run(model, both())
    assert report.tokens.n == 12 and report.counts == report.parts[""].counts
    assert set(report.aux) == {"before_1", "decoder/around_1"}
    assert report.parts["decoder"].tokens.n == 16


def test_what_is_packed_in_the_decoder_is_what_is_masked(model):
    packed, _ = run(model, depths())
    soft, _ = run(model, depths().with_twin("soft"))
    np.testing.assert_allclose(packed, soft, atol=2e-5)
    dense, _ = run(model, Plan())
    assert np.abs(packed - dense).max() > 1e-3


def test_the_decoders_gate_learns(model):
    call = Call(train=True, key=jax.random.key(3), states=both().init())

    def loss(model):
        logits, report = model(IDS, TARGET, plan=both(), call=call)
        return logits.std() + sum(report.losses.values())

    gradient = named(jax.jit(nnx.grad(loss))(model))
    gates = [leaf for name, leaf in gradient.items() if name.startswith("decoder/reductions")]
    assert gates and all(jnp.abs(gate).max() > 0 for gate in gates)


def test_step_by_step_is_the_causal_pass(model):
    alone = depths().of("decoder")

    @jax.jit
    def write(model):
        memory, _ = model.encode(IDS)
        writer, begun = Conditioned(model, model.remember(memory)), TARGET[:, :4]
        out = generate(writer, begun, steps=8, plan=alone)
        whole = jnp.concatenate([begun, out.ids[:, :-1]], axis=1)
        return out.logits, model.decode(whole, memory, plan=alone.with_twin("causal"))

    steps, whole = write(model)
    np.testing.assert_allclose(steps, whole[:, 3:], atol=2e-5)


def test_costs_are_of_both_stacks():
    dense, half = cost.macs(CONFIG), cost.macs(CONFIG, depths())
    rows = {(r.part, r.layer): r for r in cost.layer_costs(CONFIG, depths())}
    assert rows["decoder", 1].projected == 8 and rows["decoder", 0].projected == 16
    spared = dense - half
    whole, entered = rows["decoder", 0], rows["decoder", 1]
    layer = whole.attention_macs + whole.mlp_macs - entered.attention_macs - entered.mlp_macs
    assert 0 < spared < layer  # what routing costs
    gate = make_plan("mrt5", CONFIG.layout, keep=0.5, layer=1)
    look = 2 * CONFIG.pair_macs * 12  # of every target token, at the twelve that are gone
    fewer = {(r.part, r.layer): r for r in cost.layer_costs(CONFIG, gate)}
    assert whole.mlp_macs - fewer["decoder", 0].mlp_macs == 16 * look


def test_a_cache_that_evicts_is_refused(model):
    plan = make_plan("h2o", dataclasses.replace(CONFIG.decoder_layout(), part=""), keep=0.5)
    with pytest.raises(ValueError, match="reduces the cache"):
        model.make_cache(1, 16, plan)
