"""A trained Mixture-of-Depths samples as it was trained: its gate knows the top-k, and with a cache
it goes on as the full forward pass does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tokred.data.text import open_text
from tokred.methods import make_plan
from tokred.models import Decoder, DecoderConfig
from tokred.models.generate import generate
from tokred.report import Call
from tokred.train.text import TextObjective

LENGTH, BATCH, STEPS = 32, 32, 800
CONFIG = DecoderConfig(vocab=16, width=32, depth=2, heads=2, context=LENGTH)
PLAN = make_plan("mod", CONFIG.layout, keep=0.25, gate="aux", aux_weight=0.3)
OBJECTIVE = TextObjective(PLAN, documents=False)


def rows(split: str, count: int) -> dict[str, np.ndarray]:
    text = open_text("copy", split, length=LENGTH, vocab=CONFIG.vocab)
    rng = np.random.default_rng(0)
    examples = [text.transform(text.source[i], rng) for i in range(count)]
    return {name: np.stack([e[name] for e in examples]) for name in OBJECTIVE.fields}


HELD_OUT = rows("test", 256)


@pytest.fixture(scope="module")
def trained():
    """(graph, state) after `STEPS` steps on copying a random string."""
    graph, state = nnx.split(Decoder(CONFIG, plan=PLAN, rngs=nnx.Rngs(0)))
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))

    def step(carry, batch):
        state, opt = carry

        def loss_of(state):
            return OBJECTIVE(nnx.merge(graph, state), batch, jax.random.key(0), {}, {})[0]

        updates, opt = tx.update(jax.grad(loss_of)(state), opt, state)
        return (optax.apply_updates(state, updates), opt), None

    data = {k: v.reshape(STEPS, BATCH, LENGTH) for k, v in rows("train", STEPS * BATCH).items()}
    run = jax.jit(lambda carry, data: jax.lax.scan(step, carry, data)[0][0])
    return graph, run((state, tx.init(state)), data)


def look(trained, twin: str):
    """(accuracy, report) of the held-out rows under a twin."""
    graph, state = trained
    objective = dataclasses.replace(OBJECTIVE, plan=PLAN.with_twin(twin))

    @jax.jit
    def run(state, batch):
        model = nnx.merge(graph, state)
        logits, report = objective.run(model, objective.inputs(batch), Call())
        sums = objective.sums(logits, report, batch, CONFIG.layout)
        return sums["correct"] / sums["count"], report

    return run(state, {name: jnp.asarray(a) for name, a in HELD_OUT.items()})


@pytest.mark.slow
def test_the_gate_decides_as_the_top_k_did(trained):
    (accuracy, packed), (alone, causal) = look(trained, "packed"), look(trained, "causal")
    chosen, decided = (r.aux["around_1"]["entered"] for r in (packed, causal))
    assert float((chosen == decided).mean()) >= 0.95
    assert abs(float(decided.mean()) - 0.25) < 0.05
    assert float(accuracy) > 0.95 and float(alone) > 0.95


def test_sampling_with_a_cache_copies_what_the_full_pass_copies(trained):
    graph, state = trained
    half = LENGTH // 2 + 1  # the string and the separator
    ids = jnp.asarray(HELD_OUT["input"])
    steps = LENGTH - half - 1
    out = jax.jit(
        lambda s, p: generate(nnx.merge(graph, s), p, steps=steps, plan=PLAN)
    )(state, ids[:, :half])  # fmt: skip
    whole = jnp.concatenate([ids[:, :half], out.ids], axis=1)
    plan = PLAN.with_twin("causal")
    full = jax.jit(lambda s, i: nnx.merge(graph, s)(i, plan=plan)[0])(state, whole)
    np.testing.assert_array_equal(out.ids, full[:, half - 1 : -1].argmax(-1))
    answers = HELD_OUT["weight"][:, half - 1 : LENGTH - 2] > 0
    copied = np.asarray(out.ids) == HELD_OUT["target"][:, half - 1 : LENGTH - 2]
    assert copied[answers].mean() > 0.95
