"""PatchMerger, Sinkhorn, SiT: where the gradient goes, the way back, distillation, costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred import cost
from tokred.methods import make_plan
from tokred.methods.patchmerger import PatchMerger
from tokred.methods.sinkhorn import Sinkhorn
from tokred.methods.sit import Recover, Slim
from tokred.models import ViT, ViTConfig
from tokred.plan import Site
from tokred.tokens import make_tokens
from tokred.train.distill import match_layers, match_logits

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
B, N, D, P, K = 2, 9, 8, 1, 4
X = jax.random.normal(jax.random.key(0), (B, P + N, D))
CONFIG = ViTConfig(image_size=(12, 12), patch=(4, 4), width=16, depth=4, heads=2, classes=5)
IMAGES = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))


def reduced(reduction, tokens):
    module = reduction.build(D, 1, nnx.Rngs(0))
    return module, jax.jit(lambda m, t: reduction(t, {}, module=m)[:2])(module, tokens)


def test_values_of_patchmerger_are_normalised_and_of_sit_are_not():
    module, (tokens, map_) = reduced(PatchMerger(K), make_tokens(X, prefix=P))
    y = module.norm(X[:, P:])
    logits = jnp.einsum("kd,bnd->bkn", module.queries[...], y)
    close(tokens.x[:, P:], jax.nn.softmax(logits, -1) @ y)
    close(map_.back.sum(-1), 1.0)
    far = X.at[:, P:].add(100.0)  # the same to a LayerNorm
    _, (slim, _) = reduced(Slim(K), make_tokens(far, prefix=P))
    _, (near, _) = reduced(Slim(K), make_tokens(X, prefix=P))
    close(slim.x[:, P:], near.x[:, P:] + 100.0, rtol=1e-3)


def test_sinkhorn_does_not_know_lengths():
    """Neither of tokens nor of centres; no gradient goes through a centre's length."""
    reduction = Sinkhorn(K, eps=0.5)
    module, (tokens, map_) = reduced(reduction, make_tokens(X))
    graph, state = nnx.split(module)
    length = 1.0 + jnp.arange(P + N, dtype=jnp.float32)[None, :, None]
    twice = jax.tree.map(lambda a: 2 * a, state)
    again = reduction(make_tokens(X * length), {}, module=nnx.merge(graph, twice))[0]
    close(again.x, tokens.x)
    close(map_.matrix.sum(-2), 1.0)
    close(map_.matrix.sum(-1).sum(-1), P + N)

    def loss(state):
        return jnp.square(reduction(make_tokens(X), {}, module=nnx.merge(graph, state))[0].x).sum()

    slope = jax.jit(jax.grad(loss))(state)["centres"][...]
    # Through the length, too, it would be orthogonal to the centre.
    assert jnp.abs((slope * state["centres"][...]).sum(-1)).max() > 1e-3


def test_padding_takes_no_part():
    valid = jnp.broadcast_to(jnp.arange(P + N) < 7, (B, P + N))
    wild = jnp.where(valid[..., None], X, 50.0)
    for reduction in (PatchMerger(K), Sinkhorn(K), Slim(K)):
        tokens = make_tokens(X, valid=valid, prefix=P).replace(x=wild)
        module, (long, map_) = reduced(reduction, tokens)
        short = reduction(make_tokens(X[:, :7], prefix=P), {}, module=module)[0]
        close(long.x, short.x)
        close(long.sizes(), short.sizes())
        assert (map_.source[:, 7:] == -1).all() and long.valid.all()


def test_sit_recovers_all_tokens_behind_every_slimmed_layer():
    plan = make_plan("sit", CONFIG.layout, layers=(1, 3), recover=True)
    slims = [(site.layer, r.k) for site, r in plan.steps if isinstance(r, Slim)]
    reverses = [(site.layer, r.k) for site, r in plan.steps if isinstance(r, Recover)]
    assert slims == [(1, 4), (3, 2)]
    assert reverses == [(1, 4), (2, 4), (3, 2)]


def test_distillation_reaches_every_module():
    plan = make_plan("sit", CONFIG.layout, layers=(1, 3), recover=True)
    layers = ("after_1", "after_2", "after_3")
    graph, state = nnx.split(nnx.jit(lambda: ViT(CONFIG, plan=plan, rngs=nnx.Rngs(0)))())
    teacher = [jax.random.normal(jax.random.key(i), (2, 9, 16)) for i in range(3)]

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def grads(state):
        logits, report = nnx.merge(graph, state)(IMAGES, plan=plan)
        ours = [report.aux[site]["recovered"] for site in layers]
        told = match_logits(logits, jnp.eye(2, 5), temperature=2.0)
        return match_layers(ours, teacher) + told, report.maps["before_1"]

    found, map_ = grads(state)
    for site, group in found["reductions"].items():
        assert all(np.any(g) for g in jax.tree.leaves(group)), site
    heat = map_.restore(jnp.arange(5.0)[None, :, None].repeat(2, 0))  # of slims, for every patch
    assert heat.shape == (2, 10, 1) and (heat[:, 1:] >= 1).all() and (heat[:, 1:] <= 4).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sit", {"layers": (2,)}),
        ("dpc_knn", {"weight": "score"}),
        ("tokenlearner", {"version": "1.0", "tokens": 16}),
        ("tokenlearner", {"fuse": True, "tokens": 16}),
        ("expedit", {"iterations": 2, "back": "label"}),
    ],
)
def test_macs(name, options):
    config = dataclasses.replace(CONFIG, image_size=(32, 32), width=256, heads=4)
    plan = make_plan(name, config.layout, **options)
    graph, state = nnx.split(nnx.eval_shape(lambda: ViT(config, plan=plan, rngs=nnx.Rngs(0))))
    run = lambda s, x: nnx.merge(graph, s)(x, plan=plan)[0]  # noqa: E731
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    counted = cost.compiled_macs(run, state, images) / 2
    np.testing.assert_allclose(cost.macs(config, plan), counted, rtol=0.05)
    assert cost.macs(config, plan) != cost.macs(config)


def test_all_kept_is_no_pooling():
    tokens = make_tokens(X, prefix=P)
    assert PatchMerger(N)(tokens, {})[0] is tokens
    plan = make_plan("patchmerger", CONFIG.layout, keep=1.0)
    assert cost.macs(CONFIG, plan) == cost.macs(CONFIG)


def test_bad_options():
    for name, options, message in (
        ("sinkhorn", {"eps": 0.0}, "sinkhorn: eps=0.0 must be above 0"),
        ("sinkhorn", {"iterations": 0}, "sinkhorn: iterations=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_plan(name, CONFIG.layout, **options)
    for reduction in (PatchMerger(K), Recover(K, N)):
        with pytest.raises(ValueError, match="has no module for this site"):
            reduction(make_tokens(X, prefix=P), {})
    assert make_plan("sit", CONFIG.layout, layers=(2,)).steps == ((Site("before", 2), Slim(4)),)
