"""MCTF: one-step-ahead attention, counts, weights, what it may stand with, published costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred import cost
from tokred.maps import Assign
from tokred.methods import make_plan
from tokred.methods.mctf import MCTF, PROBS, RECEIVED
from tokred.methods.topk import TopK
from tokred.models import Decoder, DecoderConfig, ViT, ViTConfig, vit_config
from tokred.plan import ATTENTION, Plan, Site
from tokred.tokens import make_tokens

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
CONFIG = ViTConfig(image_size=(16, 16), patch=(4, 4), width=16, depth=3, heads=2, classes=3)
MODEL = nnx.jit(lambda: ViT(CONFIG, rngs=nnx.Rngs(0)))()
IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
B, N, H = 2, 13, 3
X = jax.random.normal(jax.random.key(1), (B, N, 4))
ATTN = jax.nn.softmax(2 * jax.random.normal(jax.random.key(2), (B, H, N, N)))


@functools.partial(jax.jit, static_argnums=0, static_argnames="prefix")
def fuse(reduction, x=X, attn=ATTN, valid=None, prefix=1):
    tokens = make_tokens(x, prefix=prefix, valid=valid)
    mean = attn.mean((1, 2))
    return reduction(tokens, {PROBS.name: attn, RECEIVED.name: mean})[:2]


@pytest.mark.parametrize("pooling", ["attention", "size", "mean"])
def test_fused_attention_still_sums_to_one(pooling):
    tokens, map_ = fuse(MCTF(5, pooling=pooling, least=0))
    rows = tokens.extra[ATTENTION]  # [B K H K]
    assert rows.shape == (B, 8, H, 8)
    close(rows.sum(-1), np.ones((B, 8, H)))
    alone = np.asarray(map_.sizes()) == 1
    for b in range(B):
        own = np.asarray(map_.index)[b][alone[b]]
        kept = np.asarray(rows[b])[alone[b]][..., alone[b]]
        np.testing.assert_array_equal(kept, np.asarray(ATTN)[b][:, own][..., own].swapaxes(0, 1))


def test_half_goes_one_way_and_half_back():
    """An even token that was merged into follows its odd one back."""
    x = jnp.eye(6, 8)[None].at[0, 4].set(jnp.array([0, 1, 0, 0, 0.3, 0, 0, 0]))
    x = x.at[0, 2].set(jnp.array([0, 1, 0.5, 0, 0, 0, 0, 0]))
    how = {"pooling": "size", "least": 0, "tau_info": 0, "ahead": 2}
    attn = jnp.full((1, 1, 6, 6), 1 / 6)
    _, both = fuse(MCTF(2, **how), x, attn)
    # 4 joins 1, which then joins 2, with what it took in.
    assert both.index.tolist() == [[0, 2, 3, 5]]
    assert both.target.tolist() == [[0, 1, 1, 2, 1, 3]]
    _, one = fuse(MCTF(2, both_ways=False, **how), x, attn)
    assert one.target.tolist() == [[0, 1, 1, 2, 1, 3]] and one.index.tolist() == [[0, 1, 3, 5]]


def test_little_attention_and_small_size_fuse_first():
    x = jnp.ones((1, 5, 2))
    attn = jnp.broadcast_to(jnp.array([0.3, 0.1, 0.2, 0.1, 0.3]), (1, 1, 5, 5))
    how = {"both_ways": False, "least": 0}
    _, map_ = fuse(MCTF(1, **how), x, attn)
    assert map_.target.tolist() == [[0, 2, 2, 3, 1]]  # 2 leaves, not 4
    tokens = make_tokens(x, size=jnp.array([[1.0, 1, 5, 1, 1]]), prefix=1)
    _, map_, _, _ = MCTF(1, tau_info=0, **how)(tokens, {PROBS.name: attn})
    assert isinstance(map_, Assign) and map_.target.tolist() == [[0, 2, 1, 3, 2]]


def test_tokens_that_nobody_sees_stay_finite():
    unseen = ATTN.at[..., 2:6].set(0.0)
    for pooling in ("attention", "max"):
        tokens, _ = fuse(MCTF(6, pooling=pooling, least=0), attn=unseen)
        assert np.isfinite(tokens.x).all() and np.isfinite(tokens.extra[ATTENTION]).all()
        assert (np.abs(np.asarray(tokens.x)).max(-1) > 1e-3).all()


def test_weights_have_no_gradient_but_fused_attention_has():
    def total(x, attn, of_attention):
        tokens, _ = fuse(MCTF(5, least=0), x, attn)
        return jnp.square(tokens.extra[ATTENTION] if of_attention else tokens.x).sum()

    to_x, to_attn = jax.grad(total, (0, 1))(X, ATTN, False)
    assert np.asarray(to_x).any(-1).all() and not np.asarray(to_attn).any()
    to_x, to_attn = jax.grad(total, (0, 1))(X, ATTN, True)
    assert not np.asarray(to_x).any() and np.asarray(to_attn).all()


def test_counts():
    assert MCTF(16).counts(197, 1) == 181
    assert MCTF(0.35).counts(33, 1) == 22
    assert [MCTF(16).counts(n, 1) for n in (21, 12, 10, 9)] == [11, 10, 10, 9]
    assert MCTF(99, least=0).counts(14, 3) == 9
    assert MCTF(0.5, least=30).counts(30, 1) == 30


def test_costs_are_those_published():
    """Of DeiT-S, 4.61 GMACs: 2.60 with 16 per layer, 2.76 with 35 % in three layers."""
    config = vit_config("vit_s16")
    macs = lambda **options: cost.macs(config, make_plan("mctf", config.layout, **options))  # noqa: E731
    assert macs(r=16) == pytest.approx(2.60e9, rel=0.01)
    assert macs(r=0.35, layers=(3, 6, 9)) == pytest.approx(2.76e9, rel=0.01)
    assert macs(r=16, ahead=2) > 1.1 * macs(r=16) and macs(keep=0.1) == macs(r=16)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_whole_prefix_is_protected(ahead):
    plan = Plan(((Site("before", 1), MCTF(5, ahead, least=0)),))
    tokens = MODEL.tokens(IMAGES).replace(prefix=4)
    tokens, _ = jax.jit(lambda tokens: MODEL.encode(tokens, plan=plan))(tokens)
    assert tokens.n == 12 and (np.asarray(tokens.sources())[:, :4] == np.arange(4)).all()
    assert ATTENTION not in tokens.extra


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ((Site("keys", 1), TopK(6)), r"reductions at \['keys'\]"),
        ((Site("around_attention", 1), TopK(6)), r"reductions at \['around_attention'\]"),
        ((Site("before", 1), MCTF(2, 2, least=0)), "cannot share 'probs'"),
    ],
)
def test_what_looks_ahead_stands_alone(other, match):
    plan = Plan(((Site("before", 1), MCTF(5, least=0)), other))
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda x: MODEL(x, plan=plan), IMAGES)


def test_a_decoder_cannot_take_known_attention():
    config = DecoderConfig(vocab=9, context=12, width=16, depth=2, heads=2, kv_heads=1, hidden=24)
    model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    plan = Plan(((Site("before", 1), MCTF(3, least=0)),))
    with pytest.raises(ValueError, match="it is a DecoderBlock with"):
        jax.eval_shape(lambda ids: model(ids, plan=plan), jnp.zeros((1, 12), jnp.int32))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ahead": 3}, "ahead=3 must be 0, 1 or 2"),
        ({"pooling": "sum"}, "pooling='sum' one of"),
        ({"layers": (4,)}, "lies outside a model of 3 layers"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        make_plan("mctf", CONFIG.layout, **options)


def test_the_first_layer_has_no_attention_before_it():
    plan = make_plan("mctf", CONFIG.layout, ahead=0, r=2, layers=(0,))
    with pytest.raises(ValueError, match="did not store it"):
        jax.eval_shape(lambda x: MODEL(x, plan=plan), IMAGES)
