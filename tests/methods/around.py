"""Checks of a method that routes tokens around the layers of a decoder, on a tiny one."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokred.methods import make_plan
from tokred.models import Decoder, DecoderConfig
from tokred.plan import Plan
from tokred.report import Call

CONFIG = DecoderConfig(vocab=31, width=16, depth=4, heads=2, kv_heads=1, hidden=32, context=32)
B, N = 3, 20
# Tokens of a row are distinct: equal ones at its start would tie.
IDS = jnp.stack([jax.random.permutation(jax.random.key(b), CONFIG.vocab)[:N] for b in range(B)])
LENGTHS = jnp.array([20, 17, 15])
VALID = jnp.arange(N)[None] < LENGTHS[:, None]
PROMPT = jnp.array([15, 13, 12])  # tokens of each row before the first that is decoded
GENERATED = jnp.maximum(jnp.arange(N)[None] - PROMPT[:, None], -1)
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)


@functools.partial(jax.jit, static_argnames="plan")
def forward(model, ids, valid=None, *, plan, extra=None):
    return model(ids, plan=plan, valid=valid, extra=extra)


@functools.partial(jax.jit, static_argnames=("plan", "fresh", "skip"))
def extend(model, ids, cache, valid=None, *, plan, extra=None, fresh=False, skip=True):
    call = Call(skip=skip and not fresh)
    return model.extend(ids, cache, valid=valid, plan=plan, extra=extra, fresh=fresh, call=call)


@dataclass(frozen=True)
class Setting:
    """A method with options on the tiny decoder.

    extra: per-token arrays, right for VALID. spread: of the weights of its routers.
    """

    method: str
    options: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    spread: float = 1.0

    @functools.cached_property
    def plan(self) -> Plan:
        return make_plan(self.method, CONFIG.layout, **self.options)

    @functools.cached_property
    def model(self) -> Decoder:
        """With decisive routers: their weights are drawn far from 0."""
        graph, routers, rest = nnx.split(
            Decoder(CONFIG, plan=self.plan, rngs=nnx.Rngs(0)), nnx.PathContains("reductions"), ...
        )
        rest = jax.tree.map(lambda a: 4 * a if a.ndim == 2 else a, rest)
        draw = functools.partial(jax.random.normal, jax.random.key(7))
        routers = jax.tree.map(lambda a: self.spread * draw(a.shape), routers)
        return nnx.merge(graph, routers, rest)

    def first(self, n: int) -> dict[str, Any]:
        """extra of the first n tokens."""
        return {name: value[:, :n] for name, value in self.extra.items()}

    def at(self, place: Any) -> dict[str, Any]:
        """extra of one token of each row."""
        return {name: value[jnp.arange(B)[:, None], place] for name, value in self.extra.items()}

    def run(self, twin: str = "packed"):
        extra = dict(self.extra)
        return forward(self.model, IDS, VALID, plan=self.plan.with_twin(twin), extra=extra)


def sites(plan: Plan) -> list[str]:
    return [site.name for site, _ in plan.steps]


def check_twins_agree(setting: Setting) -> None:
    (packed, report), (soft, masked) = setting.run(), setting.run("soft")
    close(packed[VALID], soft[VALID])
    for site, reduction in setting.plan.steps:
        assert reduction.counts(N, 0) == report.counts[site.layer].mlp < N
        assert masked.counts[site.layer].mlp == N
    for site in sites(setting.plan):
        np.testing.assert_array_equal(report.aux[site]["entered"], masked.aux[site]["entered"])


def check_padding(setting: Setting) -> None:
    """Neither the side nor the amount of padding matters."""
    shift = N - LENGTHS
    right = lambda a: jax.vmap(lambda row, by: jnp.roll(row, by, axis=0))(a, shift)  # noqa: E731
    extra = jax.tree.map(right, dict(setting.extra))
    for twin in ("packed", "soft", "causal"):
        together, _ = setting.run(twin)
        plan = setting.plan.with_twin(twin)
        moved, _ = forward(setting.model, right(IDS), right(VALID), plan=plan, extra=extra)
        close(moved[right(VALID)], together[VALID])
    n = int(LENGTHS[1])
    ids, valid, extra = jax.tree.map(lambda a: a[1:, :n], (IDS, VALID, dict(setting.extra)))
    trimmed, _ = forward(setting.model, ids, valid, plan=setting.plan, extra=extra)
    close(trimmed[valid], setting.run()[0][1:, :n][valid])


def check_gradients(setting: Setting) -> None:
    """Finite everywhere; every parameter of the routers learns, and alike in both twins."""
    graph, state = nnx.split(setting.model)

    @functools.partial(jax.jit, static_argnames="twin")
    def grads(state, ids, twin):
        def loss(state):
            model, plan = nnx.merge(graph, state), setting.plan.with_twin(twin)
            logits, report = model(ids, plan=plan, valid=VALID, extra=dict(setting.extra))
            chance = jax.nn.log_softmax(logits)[..., 0]
            return jnp.where(VALID, chance, 0).mean() + sum(report.losses.values())

        return jax.grad(loss)(state)

    packed, soft = grads(state, IDS, "packed"), grads(state, IDS, "soft")
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(packed))
    routers = jax.tree.leaves(packed["reductions"])
    assert routers and all(g.any() for g in routers)
    jax.tree.map(lambda a, b: close(a, b, atol=1e-4), packed, soft)


def check_decoding(
    setting: Setting,
    prefill: str = "causal",
    steps: int = 3,
    *,
    told: bool = False,
    skip: bool = True,
) -> None:
    """Prefill and single steps give what a forward pass of all gives under the causal twin.

    told: decoded tokens bring their extra arrays too. skip: see `Call`.
    """
    model, causal = setting.model, setting.plan.with_twin("causal")
    full, _ = setting.run("causal")
    first = int(PROMPT.max())
    valid = jnp.arange(first)[None] < PROMPT[:, None]
    plan, extra = setting.plan.with_twin(prefill), setting.first(first)
    cache = model.make_cache(B, N, plan=setting.plan)
    logits, cache, _ = extend(
        model, IDS[:, :first], cache, valid, plan=plan, extra=extra, fresh=True
    )
    close(logits[valid], full[:, :first][valid])
    for step in range(steps):
        at = (PROMPT + step)[:, None]
        ids, extra = jnp.take_along_axis(IDS, at, 1), setting.at(at) if told else None
        logits, cache, _ = extend(model, ids, cache, plan=causal, extra=extra, skip=skip)
        close(logits, jnp.take_along_axis(full, at[..., None], 1))
    assert not any(layer.dropped.any() for layer in cache.layers)


def check_dense(method: str, **options: Any) -> None:
    """A plan that lets every token enter is the dense model, bit for bit."""
    plan = make_plan(method, CONFIG.layout, keep=1.0, **options)
    model = Decoder(CONFIG, plan=plan, rngs=nnx.Rngs(0))
    wanted, _ = forward(model, IDS, VALID, plan=Plan())
    got, _ = forward(model, IDS, VALID, plan=plan)
    np.testing.assert_array_equal(got, wanted)
