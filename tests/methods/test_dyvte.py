"""DyVTE: the feature, the layer of exit, its packed form, decoding, and what routers learn from."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.methods.around import CONFIG, GENERATED, IDS, PROMPT, VALID, B, N, close, extend, forward
from tokred.gates import GumbelChoice
from tokred.methods import make_plan
from tokred.methods.dyvte import VisualExit, exit_feature, exit_labels, exit_layers, exit_loss
from tokred.models import Decoder
from tokred.models.generate import generate
from tokred.plan import Plan
from tokred.tokens import make_tokens

TARGETS = 4
VISION = jnp.broadcast_to((jnp.arange(N)[None] >= 2) & (jnp.arange(N)[None] < 6), (B, N))
EXTRA = {"vision": VISION, "generated": GENERATED}
PLAN = make_plan("dyvte", CONFIG.layout, targets=TARGETS, hidden=16)
TEXT = np.asarray(VALID & ~VISION)


def decisive(model: Decoder) -> Decoder:
    """Each layer's router with weights of its own, far from 0."""
    for layer, name in enumerate(sorted(model.reductions)):
        router = model.reductions[name]
        for i, linear in enumerate((router.fc1, router.fc2)):
            draw = jax.random.normal(jax.random.key(10 * layer + i + 20), linear.kernel.shape)
            linear.kernel[...] = draw
    return model


MODEL = decisive(Decoder(CONFIG, plan=PLAN, rngs=nnx.Rngs(0)))


def run(twin="soft", plan=PLAN, ids=IDS, valid=VALID, extra=EXTRA):
    return forward(MODEL, ids, valid, plan=plan.with_twin(twin), extra=extra)


LOGITS, REPORT = run()
EXITS = exit_layers(REPORT)


@functools.partial(jax.jit, static_argnums=2)
def by_hand(model, exits, last=CONFIG.depth):
    """Features before layer `last`; vision tokens are hidden from layer `exits` on."""
    place = jnp.broadcast_to(1.0 * jnp.arange(N), IDS.shape)[..., None]
    tokens = lambda x, valid: make_tokens(x, position=place).replace(valid=valid)  # noqa: E731
    x = model.embed(IDS)
    for layer, block in enumerate(list(model.blocks)[:last]):
        keys = VALID & ~(VISION & (layer >= exits)[:, None])
        q, k, v = block.project(tokens(x, VALID))
        x = x + block.attend(q, k, v, tokens(x, VALID), tokens(x, keys))
        x = x + block.feed(x)
    return x


def test_vision_leaves_after_the_first_router_that_fires():
    assert len(set(EXITS.tolist())) > 1 and int(EXITS.min()) < CONFIG.depth
    x = by_hand(MODEL, EXITS)
    close(LOGITS[TEXT], MODEL.embed.attend(MODEL.norm(x))[TEXT])
    prompt = VALID & (GENERATED < 0)
    for layer in range(CONFIG.depth - 1):
        feature = exit_feature(by_hand(MODEL, EXITS, layer + 1), VISION, prompt)
        said = MODEL.reductions[f"after_{layer}"](feature)
        waits = np.asarray(EXITS) >= layer + 1  # of the others the image is not there to be behind
        close(REPORT.aux[f"after_{layer}"]["logits"][waits], said[waits])
        fires = np.asarray(said[:, 1] > said[:, 0])
        np.testing.assert_array_equal(fires[waits], np.asarray(EXITS)[waits] == layer + 1)


def test_soft_is_causal():
    np.testing.assert_array_equal(LOGITS, run("causal")[0])


@pytest.mark.parametrize("row", range(B))
def test_a_packed_plan_for_the_predicted_layer(row):
    """Of each example alone, and for text alone, the same as masking; real slots are saved."""
    exits = int(EXITS[row])
    plan = make_plan("dyvte", CONFIG.layout, exit=exits, targets=TARGETS, hidden=16)
    one = jax.tree.map(lambda a: a[row : row + 1], (IDS, VALID, EXTRA))
    packed, report = run("packed", plan, *one)
    leaves = exits < CONFIG.depth
    assert [c.out for c in report.counts] == [
        N - TARGETS * (leaves and i >= exits - 1) for i in range(CONFIG.depth)
    ]
    close(report.restore(packed)[0][TEXT[row]], LOGITS[row][TEXT[row]])
    source, place = report.tokens.sources()[0], report.tokens.position[0, :, 0]
    np.testing.assert_array_equal(place[source[TEXT[row]]], np.flatnonzero(TEXT[row]))
    assert leaves == bool((source[VISION[row]] < 0).all())


def test_a_plan_for_a_batch_takes_vision_from_none_too_early():
    plan = make_plan("dyvte", CONFIG.layout, exit=int(EXITS.max()), rule="plan", targets=TARGETS)
    packed, report = run("packed", plan)
    soft, masked = run("soft", plan)
    close(report.restore(packed)[TEXT], soft[TEXT])
    last = np.asarray(EXITS) == int(EXITS.max())
    close(soft[last][TEXT[last]], LOGITS[last][TEXT[last]])
    assert all(not aux["overflow"].any() for aux in report.aux.values())
    assert masked.tokens.n == N


def test_nothing_leaves_of_a_row_without_vision():
    bare = {**EXTRA, "vision": jnp.zeros_like(VISION)}
    logits, report = run(extra=bare)
    np.testing.assert_array_equal(exit_layers(report), 1)
    close(logits[VALID], forward(MODEL, IDS, VALID, plan=Plan())[0][VALID])
    plan = make_plan("dyvte", CONFIG.layout, exit=2, targets=TARGETS, hidden=16)
    _, packed = run("packed", plan, extra=bare)
    np.testing.assert_array_equal(packed.aux["after_1"]["overflow"], [4, 1, 0])


def test_keep_is_a_share_of_layers():
    outs = [make_plan("dyvte", CONFIG.layout, keep=k, targets=4) for k in (0.01, 0.5, 0.75, 1.0)]
    steps: Any = [plan.steps for plan in outs]
    last = [[r.leaves for _, r in each] for each in steps]
    assert last == [[i == e - 1 for i in range(3)] for e in (1, 2, 3, 4)]
    packed, report = run("packed", outs[-1])
    np.testing.assert_array_equal(packed, forward(MODEL, IDS, VALID, plan=Plan())[0])
    assert not report.maps


def test_scanned_layers():
    model = Decoder(dataclasses.replace(CONFIG, scan=True), plan=PLAN, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.state(MODEL))
    logits, report = forward(model, IDS, plan=PLAN.with_twin("soft"), extra=EXTRA)
    plain, _ = forward(MODEL, IDS, plan=PLAN.with_twin("soft"), extra=EXTRA)
    close(logits, plain)
    assert exit_layers(report).shape == (B,)


def test_feature():
    x = jax.random.normal(jax.random.key(0), (B, N, 3))
    prompt = VALID & (GENERATED < 0)
    got = exit_feature(x, VISION, prompt)
    for row, end in enumerate(PROMPT.tolist()):
        wanted = jnp.concatenate([x[row, 6 : end - 1].mean(0), x[row, end - 1]])
        close(got[row], wanted)
    right = lambda a: jnp.concatenate([a[:, 17:], a[:, :17]], axis=1)  # noqa: E731
    close(exit_feature(right(x), right(VISION), right(prompt)), got)
    short = jnp.arange(N)[None] < 7  # one token behind the image: its mean is of nothing
    close(exit_feature(x, VISION, jnp.broadcast_to(short, (B, N)))[:, :3], 0.0)
    assert not jax.grad(lambda x: exit_feature(x, VISION, prompt).sum())(x).any()


def prefill(twin, plan=PLAN):
    n = int(PROMPT.max())
    extra = {name: value[:, :n] for name, value in EXTRA.items()}
    cache = MODEL.make_cache(B, N, plan=plan)
    valid = jnp.arange(n)[None] < PROMPT[:, None]
    return extend(
        MODEL, IDS[:, :n], cache, valid, plan=plan.with_twin(twin), extra=extra, fresh=True
    )


@pytest.mark.parametrize("twin", ["causal", "packed"])
def test_decoding(twin):
    """Prefill and steps as one pass; later layers hold no vision, so layers differ in length."""
    rule = "gate" if twin == "causal" else "plan"
    plan = make_plan("dyvte", CONFIG.layout, exit=2, targets=TARGETS, rule=rule, hidden=16)
    full, _ = run("causal", plan)
    exits = EXITS if rule == "gate" else jnp.full((B,), 2)
    logits, cache, told = prefill(twin, plan)
    n = logits.shape[1]
    before = TEXT[:, : int(PROMPT.max())] & np.asarray(GENERATED < 0)[:, : int(PROMPT.max())]
    close(told.restore(logits)[before], full[:, : before.shape[1]][before])
    assert n == int(PROMPT.max()) - (TARGETS if twin == "packed" else 0)
    for layer in range(CONFIG.depth):
        gone = TARGETS * (layer >= np.asarray(exits))
        np.testing.assert_array_equal(cache.occupancy()[:, layer], PROMPT - gone)
    for step in range(3):
        at = (PROMPT + step)[:, None]
        ids = jnp.take_along_axis(IDS, at, 1)
        logits, cache, _ = extend(MODEL, ids, cache, plan=plan.with_twin("causal"))
        close(logits, jnp.take_along_axis(full, at[..., None], 1))


@pytest.mark.parametrize("twin", ["causal", "packed"])
def test_sampling(twin):
    """As a full pass of what was sampled, whatever form the prompt took."""
    plan = make_plan("dyvte", CONFIG.layout, exit=2, targets=TARGETS, rule="plan")
    n, steps = int(PROMPT.max()), 3
    valid, vision = jnp.arange(n)[None] < PROMPT[:, None], {"vision": VISION[:, :n]}
    out = generate(
        MODEL, IDS[:, :n], steps=steps, plan=plan, prefill=twin, valid=valid, extra=vision
    )
    whole = jnp.pad(IDS[:, :n], ((0, 0), (0, steps)))
    for step in range(steps):
        whole = whole.at[jnp.arange(B), PROMPT + step].set(out.ids[:, step])
    until = jnp.arange(n + steps)[None] < (PROMPT + steps)[:, None]
    extra = {"vision": jnp.pad(VISION[:, :n], ((0, 0), (0, steps)))}
    full, _ = forward(MODEL, whole, until, plan=plan.with_twin("causal"), extra=extra)
    at = PROMPT[:, None] - 1 + jnp.arange(steps)[None]
    close(out.logits, jnp.take_along_axis(full, at[..., None], 1))


def test_labels():
    v, n = 5, 200
    target = jnp.zeros((4, n), jnp.int32)
    weight = jnp.broadcast_to(jnp.arange(n)[None] >= 100, (4, n)).astype(jnp.float32)
    shown = jnp.broadcast_to(3.0 * jax.nn.one_hot(0, v), (4, n, v))
    hidden = shown.at[0, :100].set(0.0)  # not the answer
    hidden = hidden.at[1, 150].set(3.0 * jax.nn.one_hot(1, v))  # 99 % of it
    hidden = hidden.at[2].multiply(0.9)  # its loss
    np.testing.assert_array_equal(exit_labels(shown, hidden, target, weight), [1, 0, 0, 1])
    lenient = exit_labels(shown, hidden, target, weight, agreement=0.98, slack=2.0)
    np.testing.assert_array_equal(lenient, 1)


def training():
    target = jnp.roll(IDS, -1, axis=1)
    weight = (VALID & (GENERATED >= 0)).astype(jnp.float32)
    graph, state = nnx.split(MODEL)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(state):
        model = nnx.merge(graph, state)
        return exit_loss(model, IDS, target, weight, layer=1, extra=EXTRA, valid=VALID)

    return loss, state


def test_one_router_learns_from_two_runs():
    loss, state = training()
    tx = optax.adam(0.1)

    @jax.jit
    def step(state, opt):
        (value, labels), grads = loss(state)
        updates, opt = tx.update(grads, opt, state)
        return optax.apply_updates(state, updates), opt, value, labels, grads

    opt, values = tx.init(state), []
    for _ in range(40):
        state, opt, value, labels, grads = step(state, opt)
        values.append(float(value))
        if len(values) == 1:
            own = grads["reductions"].pop("after_1")
            assert all(g.any() for g in jax.tree.leaves(own))
            assert not any(g.any() for g in jax.tree.leaves(grads))
    assert labels.shape == (B,) and set(labels.tolist()) == {0, 1}
    assert values[-1] < 0.1 < values[0]


def test_gate_is_the_larger_logit():
    logits = jnp.array([[0.0, 1e-7], [0.0, 0.0], [1.0, -1.0]])
    choice, _, _ = GumbelChoice().update(logits)
    np.testing.assert_array_equal(choice[:, 1], [1, 0, 0])


def test_bad_options():
    with pytest.raises(ValueError, match=r"dyvte: rule='any'.*change rule"):
        VisualExit(True, rule="any")
    with pytest.raises(ValueError, match=r"dyvte: targets=-1.*make it"):
        VisualExit(True, -1)
    with pytest.raises(ValueError, match=r"dyvte: exit=5 must lie in \[1, 4\]"):
        make_plan("dyvte", CONFIG.layout, exit=5)
    with pytest.raises(ValueError, match=r"targets=32 vision tokens leave nothing.*lower targets"):
        make_plan("dyvte", CONFIG.layout, targets=32)


def test_bad_input():
    with pytest.raises(ValueError, match="extra="):
        run(extra={})
    with pytest.raises(ValueError, match=r"no exits.*with_twin"):
        exit_layers(run("packed")[1])
    with pytest.raises(ValueError, match="has no module for this site"):
        forward(Decoder(CONFIG, rngs=nnx.Rngs(0)), IDS, plan=PLAN.with_twin("soft"), extra=EXTRA)
    with pytest.raises(ValueError, match="layer=3 must lie in"):
        exit_loss(MODEL, IDS, IDS, 1.0 * VALID, layer=3, extra=EXTRA)
