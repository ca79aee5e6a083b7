"""Decoders beside the dense one: what is timed is what the rows say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tokred.cost import macs
from tokred.cost.bench import split
from tokred.cost.bench_decoder import PLAIN, Passes, bench_decoder, gradient
from tokred.cost.decoding import decode_steps, drawn, fill, token_macs
from tokred.methods import make_plan
from tokred.models import Decoder, DecoderConfig
from tokred.report import Call

CONFIG = DecoderConfig(vocab=20, width=16, depth=2, heads=2, context=16)
PLAN = make_plan("mod", CONFIG.layout, keep=0.25)
KEY = jax.random.key(0)
TOKENS, STEPS, BATCH = 16, 4, 3


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    passes = Passes(train=True, decode=True, steps=STEPS, share=1.0)
    how = {"tokens": TOKENS, "batch": BATCH, "rounds": 1, "keep": 0.25}
    return bench_decoder(CONFIG, ["mod"], passes=passes, best_dense=True, **how)


def test_rows_by_pass(rows):
    whole = ["dense", "mod", PLAIN]
    wanted = [(p, m) for p in ("forward", "train") for m in whole]
    wanted += [("decode", "dense"), ("decode", "mod"), ("decode, skip", "mod")]
    assert [(row["pass"], row["method"]) for row in rows] == wanted


def test_ratios_are_to_the_faster_dense_row(rows):
    for kind in ("forward", "train"):
        dense, mod, plain = (row for row in rows if row["pass"] == kind)
        best = min(dense["ms"], plain["ms"])
        assert [row["ms_ratio"] for row in (dense, mod, plain)] == [
            row["ms"] / best for row in (dense, mod, plain)
        ]
        assert mod["macs_ratio"] == macs(CONFIG, PLAN) / macs(CONFIG) < 1
    dense, mod, skip = rows[-3:]
    assert mod["ms_ratio"] == mod["ms"] / dense["ms"]
    assert skip["ms_ratio"] == skip["ms"] / dense["ms"]


def test_bytes_and_shares_of_decoding(rows):
    dense, mod, skip = rows[-3:]
    entries = CONFIG.depth * TOKENS * BATCH * 2 * CONFIG.width * 4
    assert dense["cache_bytes"] == dense["used_bytes"] == entries == mod["cache_bytes"]
    assert dense["share"] is None and mod["share"] == skip["share"] == 1.0
    assert mod["used_bytes"] == entries


def decode(model: Decoder, share: float, skip: bool):
    plan = drawn(PLAN, share)
    f, params, rest = decode_steps(model, plan, TOKENS, STEPS, share, skip)
    cache = model.make_cache(BATCH, TOKENS, plan=plan)
    return jax.jit(f)(cache, params, rest, KEY)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_decoded_tokens_enter_as_often_as_told(model, share: float, skip: bool):
    cache, ids, entered = decode(model, share, skip)
    assert ids.shape == (STEPS, BATCH)
    assert {site: float(mean) for site, mean in entered.items()} == {"around_1": share}
    assert [int(c.length.max()) for c in cache.layers] == [TOKENS, int(share * TOKENS)]
    assert not any(layer.dropped.any() for layer in cache.layers)


def test_skipping_changes_no_token(model):
    plain, skipped = (decode(model, 0.3, skip) for skip in (False, True))
    np.testing.assert_array_equal(plain[1], skipped[1])
    assert 0 < float(plain[2]["around_1"]) < 1


def test_fill_spreads_entries(model):
    cache = fill(model.make_cache(2, 8), 6, [6] * CONFIG.depth, {1: 0.5})
    np.testing.assert_array_equal(cache.layers[1].position[0, 0], [0, 2, 4, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(cache.layers[0].length, jnp.full((2, 2), 6))
    np.testing.assert_array_equal(cache.seen, [6, 6])


def test_macs_of_a_token(model):
    dense = token_macs(model, make_plan("dense", CONFIG.layout), {}, TOKENS)
    assert dense == CONFIG.depth * CONFIG.layer_macs(1, 1, TOKENS, 1) + CONFIG.outer_macs(1)
    router = CONFIG.width
    assert token_macs(model, PLAN, {"around_1": 1.0}, TOKENS) == dense + router
    left = CONFIG.layer_macs(1, 1, TOKENS, 1) + CONFIG.outer_macs(1) + router
    assert token_macs(model, PLAN, {"around_1": 0.0}, TOKENS) == left


def test_the_gradient_is_of_the_whole_loss(model):
    ids = jax.random.randint(KEY, (2, TOKENS + 1), 0, CONFIG.vocab)
    f, params, rest = gradient(model, PLAN)
    loss, slope = jax.jit(f)(params, rest, ids, KEY)
    merge, *state = split(model, PLAN)

    @jax.jit
    def run(params, rest):
        again, modules = merge(params, rest)
        return again(ids[:, :-1], plan=PLAN, call=Call(modules=modules, train=True))

    logits, report = run(*state)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
    assert float(loss) == pytest.approx(float(nats + sum(report.losses.values())), rel=1e-6)
    assert report.losses and all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize(
    "methods, changes, sentence",
    [
        (["mood"], {}, "unknown; did you mean 'mod'"),
        (["tome"], {}, r"'tome' leaves \d+ of 16 tokens"),
        (["evit"], {}, "needs a class token"),
        (["mod"], {"tokens": 17}, r"tokens=17 must lie in \[2, 16\]"),
        (["mod"], {"passes": Passes(decode=True, steps=16)}, "steps=16 must lie in"),
        (["mod"], {"passes": Passes(decode=True, steps=4, share=2.0)}, "share=2.0 must lie in"),
    ],
)
def test_what_does_not_fit_is_refused(methods, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        bench_decoder(CONFIG, methods, **{"tokens": 16, **changes})


def test_a_method_without_own_decisions_does_not_decode(monkeypatch):
    cls = type(PLAN.steps[0][1])
    monkeypatch.setattr(cls, "decides", property(lambda self: False))
    with pytest.raises(ValueError, match="lets no token decide alone"):
        bench_decoder(CONFIG, ["mod"], tokens=16, passes=Passes(decode=True, steps=4))


def test_solves_for_macs():
    rows = bench_decoder(CONFIG, ["mod"], tokens=16, batch=1, rounds=1, ratio=0.9)
    assert rows[1]["macs_ratio"] <= 0.9


def test_an_evicting_cache_costs_what_it_holds(model):
    plan = make_plan("h2o", CONFIG.layout, budget=4)
    dense = make_plan("dense", CONFIG.layout)
    saved = token_macs(model, dense, {}, TOKENS) - token_macs(model, plan, {}, TOKENS)
    assert saved == CONFIG.depth * 2 * (TOKENS - 4) * CONFIG.pair_macs
    row = bench_decoder(
        CONFIG, ("dense", "h2o"), keep=0.5, tokens=TOKENS, batch=2, rounds=1,
        passes=Passes(decode=True, steps=2),
    )[-1]  # fmt: skip
    assert row["pass"] == "decode" and row["used_bytes"] < row["cache_bytes"]
