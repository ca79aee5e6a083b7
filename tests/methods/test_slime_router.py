"""SliME's router: which tokens a text lets stay, padding, several images, and inside a model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.methods.slime_router import WORDS, SlimeRouter, keep_mass, score_by_text
from tokred.models import VLM, DecoderConfig, ViTConfig, VLMConfig
from tokred.report import Call
from tokred.tokens import Tokens, make_tokens

B, S, N, T, D = 2, 3, 8, 5, 16  # S images
X = jax.random.normal(jax.random.key(0), (B, N, D))
MANY = jax.random.normal(jax.random.key(1), (B, S, N, D))
TEXT = jax.random.normal(jax.random.key(2), (B, T, D))
SHARP: dict[str, Any] = {"temperature": 0.1, "top_p": 0.8}
either = pytest.mark.parametrize("scorer", ["cosine", "attention"])
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def route(reduction, x=X, words=None, module=None, valid=None, prefix=0, key=None, **how):
    def run(tokens, words, module, key):
        return reduction(tokens, {WORDS.name: words}, module=module, key=key, **how)

    tokens = make_tokens(x, valid=valid, prefix=prefix)
    return jax.jit(run)(tokens, Tokens(TEXT) if words is None else words, module, key)


def stayed(tokens) -> np.ndarray:
    return np.asarray(tokens.sources()) >= 0


def module_of(reduction):
    return nnx.jit(lambda: reduction.build(D, 2, nnx.Rngs(0)))()


def test_scores_are_sums_of_cosines():
    valid = jnp.arange(T) < 3
    valid = jnp.stack([valid, ~valid])
    cosine = np.einsum("bnd,btd->bnt", X, TEXT)
    cosine /= np.linalg.norm(X, axis=-1)[..., None] * np.linalg.norm(TEXT, axis=-1)[:, None]
    close(score_by_text(X, TEXT, valid), (cosine * valid[:, None]).sum(-1))
    close(score_by_text(X, TEXT), cosine.mean(-1))
    assert not score_by_text(jnp.zeros_like(X), TEXT).any()


def test_mass_is_passed_by_the_last_that_stays():
    chance = jnp.asarray([[0.125, 0.5, 0.25, 0.125], [0.25, 0.25, 0.25, 0.25]])
    stays = {p: keep_mass(chance, p).astype(int).tolist() for p in (0.4, 0.5, 0.75, 0.9, 1.0)}
    assert stays[0.4] == [[0, 1, 0, 0], [1, 1, 0, 0]]
    assert stays[0.5] == [[0, 1, 1, 0], [1, 1, 1, 0]]
    assert stays[0.75] == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert stays[0.9] == stays[1.0] == [[1, 1, 1, 1], [1, 1, 1, 1]]


def test_what_stays_keeps_its_order_in_static_slots():
    tokens, map_, _, aux = route(SlimeRouter(**SHARP))
    assert tokens.n == map_.k == N
    kept = stayed(tokens)
    assert 0 < kept.sum() < B * N
    for b in range(B):
        close(tokens.x[b, : kept[b].sum()], X[b][kept[b]])
        np.testing.assert_array_equal(tokens.valid[b], np.arange(N) < kept[b].sum())
        chance = np.asarray(aux["chance"][b])
        assert chance[kept[b]].min() > chance[~kept[b]].max()
        assert chance[kept[b]].sum() > SHARP["top_p"]
        assert chance[kept[b]].sum() - chance[kept[b]].min() <= SHARP["top_p"]
    assert float(aux["share"]) == pytest.approx(kept.mean())
    assert not aux["overflow"].any()


def test_a_top_p_of_one_keeps_all():
    tokens = make_tokens(X)
    assert SlimeRouter(1.0)(tokens, {})[0] is tokens
    half, _, _, aux = route(SlimeRouter(1.0, capacity=0.5))
    assert half.n == N // 2 and half.valid.all()
    np.testing.assert_array_equal(aux["overflow"], [N // 2] * B)
    best = jnp.sort(jnp.argsort(-aux["score"], axis=-1)[:, : N // 2], axis=-1)
    close(half.x, jnp.take_along_axis(X, best[..., None], axis=1))


@pytest.mark.parametrize("capacity", [1.0, 0.4, 0.01])
@either
def test_both_twins_keep_the_same(capacity, scorer):
    reduction = SlimeRouter(**SHARP, capacity=capacity, scorer=scorer)
    module = module_of(reduction)
    packed, _, _, aux = route(reduction, module=module)
    soft, map_, _, _ = route(reduction, module=module, twin="soft")
    assert soft.n == map_.k == N and packed.n == reduction.counts(N, 0)
    np.testing.assert_array_equal(stayed(packed), stayed(soft))
    np.testing.assert_array_equal(stayed(packed), soft.valid)
    close(jnp.where(soft.valid[..., None], soft.x, 0).sum(1), packed.x.sum(1))
    assert (aux["overflow"] + stayed(packed).sum(-1) <= N).all()


@either
def test_padding_changes_nothing(scorer):
    """That of the image and that of the text."""
    reduction = SlimeRouter(**SHARP, scorer=scorer)
    module = module_of(reduction)
    words = Tokens(TEXT[:, :3], valid=jnp.ones((B, 3), bool))
    short, _, _, before = route(reduction, X[:, :5], words, module)
    valid = jnp.broadcast_to(jnp.arange(N) < 5, (B, N))
    said = jnp.broadcast_to(jnp.arange(T) < 3, (B, T))
    words = Tokens(TEXT.at[:, 3:].set(99.0), valid=said)
    padded, _, _, after = route(reduction, X.at[:, 5:].set(99.0), words, module, valid)
    close(after["chance"][:, :5], before["chance"])
    np.testing.assert_array_equal(stayed(padded), np.pad(stayed(short), ((0, 0), (0, N - 5))))
    close(padded.x[:, :5], short.x)


def test_one_token_stays_and_padding_never_does():
    reduction = SlimeRouter(top_p=0.01, capacity=0.5)
    silent = Tokens(TEXT, valid=jnp.zeros((B, T), bool))
    tokens, _, _, aux = route(reduction, words=silent)
    np.testing.assert_array_equal(stayed(tokens).sum(-1), 1)
    close(aux["chance"], np.full((B, N), 1 / N))
    valid = jnp.zeros((B, N), bool).at[0, 6].set(True)
    tokens, _, _, aux = route(reduction, words=silent, valid=valid)
    np.testing.assert_array_equal(stayed(tokens), valid)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((tokens.x, aux)))


def test_the_prefix_stays_in_front():
    reduction = SlimeRouter(top_p=0.01, capacity=0.5)
    tokens, _, _, aux = route(reduction, prefix=2)
    assert tokens.n == reduction.counts(N, 2) == 5 and tokens.prefix == 2
    close(tokens.x[:, :2], X[:, :2])
    np.testing.assert_array_equal(tokens.valid, [[True] * 3 + [False] * 2] * B)
    assert not aux["chance"][:, :2].any()
    close(aux["chance"].sum(-1), np.ones(B))


@either
def test_images_of_an_example_are_chosen_from_each_alone(scorer):
    reduction = SlimeRouter(**SHARP, capacity=0.75, scorer=scorer)
    module = module_of(reduction)
    many, map_, _, _ = route(reduction, MANY, module=module)
    assert many.x.shape == (B, S, 6, D) and map_.batch == (B, S)
    for i in range(S):
        one, _, _, _ = route(reduction, MANY[:, i], module=module)
        np.testing.assert_array_equal(stayed(many)[:, i], stayed(one))
        close(many.x[:, i], one.x)


def test_images_may_share_their_mass():
    """As all crops of an image do: then it is one row of tokens."""
    together = SlimeRouter(**SHARP, together=True)
    row, _, _, whole = route(SlimeRouter(**SHARP), MANY.reshape(B, S * N, D))
    many, _, _, aux = route(together, MANY)
    np.testing.assert_array_equal(stayed(many).reshape(B, -1), stayed(row))
    close(aux["chance"].reshape(B, -1), whole["chance"])
    assert (stayed(many).sum(-1) != stayed(route(SlimeRouter(**SHARP), MANY)[0]).sum(-1)).any()
    less, *_ = route(together, MANY, valid=jnp.ones((B, S, N), bool).at[:, 2].set(False))
    two, *_ = route(together, MANY[:, :2])
    np.testing.assert_array_equal(stayed(less)[:, :2], stayed(two))


def test_training_disturbs_the_scores():
    reduction, key = SlimeRouter(**SHARP, noise=3.0), jax.random.key(4)
    calm, _, _, aux = route(reduction)
    noisy, _, _, drawn = route(reduction, train=True, key=key)
    again, _, _, _ = route(reduction, train=True, key=key, twin="soft")
    close(aux["score"], drawn["score"])
    assert (stayed(calm) != stayed(noisy)).any()
    np.testing.assert_array_equal(stayed(noisy), stayed(again))
    quiet, *_ = route(SlimeRouter(**SHARP, noise=0.0), train=True)
    np.testing.assert_array_equal(stayed(quiet), stayed(calm))
    with pytest.raises(ValueError, match=r"noise=3\.0 in training draws; pass Call\(key"):
        route(reduction, train=True)


def test_the_attention_router_learns_from_what_it_lets_stay():
    """Which passes it by unchanged; cosines get no gradient at all."""
    reduction = SlimeRouter(**SHARP, scorer="attention")
    graph, state = nnx.split(module_of(reduction))

    def loss(state, text, reduction):
        module = nnx.merge(graph, state)
        tokens, *_ = reduction(Tokens(X), {WORDS.name: Tokens(text)}, module=module)
        return jnp.square(tokens.x).sum(), tokens

    grads = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (weights, text), tokens = grads(state, TEXT, reduction)
    for leaf in (*jax.tree.leaves(weights["look"]["query"]), text):
        assert jnp.isfinite(leaf).all() and leaf.any()
    for b in range(B):
        np.testing.assert_array_equal(tokens.x[b][tokens.valid[b]], X[b][stayed(tokens)[b]])
    (_, text), _ = grads(state, TEXT, SlimeRouter(**SHARP))
    assert not text.any()


def test_the_official_softmax_is_over_the_batch():
    logits = SlimeRouter(scorer="attention", temperature=0.5)
    official = SlimeRouter(scorer="attention", temperature=0.5, official=True)
    module = module_of(logits)
    *_, plain = route(logits, module=module)
    *_, mixed = route(official, module=module)
    close(mixed["score"], jax.nn.softmax(plain["score"] / 0.5, axis=0))
    close(mixed["chance"], jax.nn.softmax(mixed["score"] / 0.5, axis=-1))


def test_words_of_another_width():
    reduction = SlimeRouter(**SHARP, scorer="attention", text_width=7)
    tokens, *_ = route(reduction, words=Tokens(TEXT[..., :7]), module=module_of(reduction))
    assert stayed(tokens).any(-1).all()


VISION = ViTConfig(
    image_size=(16, 16), patch=(4, 4), channels=1, width=32, depth=2, heads=2, classes=0,
    pool="mean", class_token=False,
)  # fmt: skip
DECODER = DecoderConfig(vocab=260, width=32, depth=2, heads=2, context=64)
CONFIG = VLMConfig(vision=VISION, decoder=DECODER, images=2)
IDS = jnp.asarray([[1, 259, 2, 3, 259, 4], [259, 6, 7, 8, 0, 0]])
VALID = jnp.asarray([[True] * 6, [True] * 4 + [False] * 2])
GIVEN = jnp.asarray([[True, True], [True, False]])
ASKED = VALID & (IDS < 250) & (jnp.arange(6) < 4)[None]
IMAGES = jax.random.normal(jax.random.key(6), (2, 2, 16, 16, 1))


def plan_of(twin="packed", **options):
    return make_plan("slime_router", CONFIG.layout, **options).with_twin(twin)


@functools.cache
def model_of(plan):
    return nnx.split(nnx.jit(lambda: VLM(CONFIG, plan=plan, rngs=nnx.Rngs(0)))())


@functools.cache
def forward_of(plan, train=False):
    graph, _ = model_of(plan)

    def forward(state, ids, images):
        call = Call(key=jax.random.key(7), train=train)
        model = nnx.merge(graph, state)
        given = {"valid": VALID, "image_valid": GIVEN, "question": ASKED}
        return model(ids, images, plan=plan, call=call, **given)

    return jax.jit(forward)


def see(plan, ids=IDS, images=IMAGES, train=False):
    return forward_of(plan, train)(model_of(plan)[1], ids, images)


@either
def test_the_decoder_reads_what_stays(scorer):
    """Gathered or hidden, its logits are the same, and no answer is read."""
    options = {"keep": 0.5, "top_p": 0.3, "scorer": scorer, "temperature": 0.2}
    plan = plan_of(**options)
    assert CONFIG.image_tokens(plan) == 8
    logits, report = see(plan)
    soft, _ = see(plan_of("soft", **options))
    close(logits[VALID], soft[VALID], rtol=1e-4, atol=1e-5)
    aux = report.aux["connector/output"]
    assert aux["chance"].shape == (2, 2, 16) and report.tokens.n == 6 + 2 * 7
    _, other = see(plan, ids=IDS.at[0, 5].set(9))
    close(other.aux["connector/output"]["score"], aux["score"])
    _, asked = see(plan, ids=IDS.at[0, 2].set(9))
    assert (asked.aux["connector/output"]["score"][0] != aux["score"][0]).any()


def test_absent_images_leave_no_trace_and_noise_does():
    plan = plan_of("soft", top_p=0.5)
    first, _ = see(plan)
    second, _ = see(plan, images=IMAGES.at[1, 1].add(1.0))
    close(first[VALID], second[VALID])
    noisy, _ = see(plan, train=True)
    assert jnp.isfinite(noisy).all() and jnp.abs(noisy - first).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_p": 0.0}, r"top_p=0\.0 must lie in \(0, 1\]; change top_p"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be above 0"),
        ({"noise": -1.0}, r"noise=-1\.0 must be at least 0"),
        ({"scorer": "dot"}, r"scorer='dot' must be one of \('cosine', 'attention'\)"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        plan_of(**options)


def test_bad_words():
    with pytest.raises(ValueError, match=r"leading axes \(1,\) must begin .* \(2,\)"):
        route(SlimeRouter(), words=Tokens(TEXT[:1]))
    with pytest.raises(ValueError, match="tokens of 16 channels have no cosine with words of 7"):
        route(SlimeRouter(), words=Tokens(TEXT[..., :7]))
    with pytest.raises(ValueError, match="build it with plan="):
        route(SlimeRouter(scorer="attention"))
