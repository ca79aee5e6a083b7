"""The runner of all blocks: which layers it scans, and that scanning changes nothing."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.models import Decoder, DecoderConfig, ViT, ViTConfig
from tokred.nn.layers import Layers, Run
from tokred.plan import Ask, Plan, Reduction, Site
from tokred.report import Call

CONFIG = DecoderConfig(vocab=7, width=8, depth=6, heads=2, hidden=8, context=10)
IMAGES = ViTConfig(image_size=(8, 8), patch=(4, 4), width=8, depth=6, heads=2, classes=3)
IDS = jax.random.randint(jax.random.key(0), (2, 10), 0, 7)


@dataclasses.dataclass(frozen=True)
class Look(Reduction):
    """Changes nothing; reads evidence."""

    asks: tuple[Ask, ...] = ()  # type: ignore[misc]

    def counts(self, n: int, prefix: int) -> int:
        return n


def runs(config: Any, plan: Plan) -> list[Run]:
    make: Any = Decoder if isinstance(config, DecoderConfig) else ViT
    model = nnx.eval_shape(lambda: make(config, plan=plan, rngs=nnx.Rngs(0)))
    call = Call(modules=dict(model.reductions))
    return Layers(model.blocks, scan=True).runs(plan, call, plan.counts(config.layout))


def routed(**options: Any) -> Plan:
    return make_plan("mod", CONFIG.layout, keep=0.4, **options)


def windows(every: int) -> DecoderConfig:
    return dataclasses.replace(CONFIG, window=3, global_every=every)


@pytest.mark.parametrize(
    ("config", "plan", "expected"),
    [
        (CONFIG, Plan(), [(0, 1, 6)]),
        (CONFIG, routed(), [(0, 2, 3)]),
        (CONFIG, routed(layers=(2,)), [(0, 1, 2), (2, 1, 1), (3, 1, 3)]),
        (CONFIG, routed(layers=(3, 4, 5)), [(0, 1, 3), (3, 1, 3)]),
        (windows(2), Plan(), [(0, 2, 3)]),
        (windows(3), Plan(), [(0, 3, 2)]),
        (windows(5), Plan(), [(0, 1, 4), (4, 1, 1), (5, 1, 1)]),
        (
            IMAGES,
            make_plan("topk", IMAGES.layout, keep=0.5, layers=(2,)),
            [(0, 1, 2), (2, 1, 1), (3, 1, 3)],
        ),
        (
            CONFIG,
            Plan(((Site("mid", 3), Look((Ask("keys", layer=-2),))),)),
            [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 2)],
        ),
    ],
)
def test_equal_layers_are_found(config: Any, plan: Plan, expected: list):
    assert runs(config, plan) == [Run(*run) for run in expected]


def outcome(config: DecoderConfig, plan: Plan, call: Call, grad: bool = False) -> Any:
    model = nnx.jit(lambda: Decoder(CONFIG, plan=plan, rngs=nnx.Rngs(0)))()
    state = nnx.split(model)[1]
    graph = nnx.split(nnx.eval_shape(lambda: Decoder(config, plan=plan, rngs=nnx.Rngs(0))))[0]

    def forward(state: Any, ids: jax.Array) -> Any:
        logits, report = nnx.merge(graph, state)(ids, plan=plan, call=call)
        return logits.var() + sum(report.losses.values()), (logits, report)

    return jax.jit(jax.grad(forward, has_aux=True) if grad else forward)(state, IDS)


SCANNED = dataclasses.replace(CONFIG, scan=True)
same = functools.partial(
    jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
)
PLANS = {
    "dense": Plan(),
    "gates": routed(gate="predictor"),
    "drawn": routed(router="random"),
    "two": routed(layers=(1, 2, 4, 5)),
    "shared": make_plan("gammamod", CONFIG.layout, keep=0.5, protect=False, layers=(1, 2, 3, 4)),
}


@pytest.mark.parametrize("name", PLANS)
def test_scanned_is_unrolled(name: str):
    """Logits, and all that the report tells, layer by layer, with the key of every layer."""
    call = Call(key=jax.random.key(5))
    (_, (logits, report)), (_, (expected, wanted)) = (
        outcome(config, PLANS[name], call) for config in (SCANNED, CONFIG)
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert (report.aux.keys(), report.maps.keys()) == (wanted.aux.keys(), wanted.maps.keys())
    same(report, wanted)


@pytest.mark.parametrize("remat", [0, 4])
def test_gradients_of_scanned_layers(remat: int):
    call = Call(key=jax.random.key(5), train=True, remat=remat)
    found, _ = outcome(SCANNED, PLANS["gates"], call, grad=True)
    wanted, _ = outcome(CONFIG, PLANS["gates"], dataclasses.replace(call, remat=0), grad=True)
    same(found, wanted)


def test_stochastic_depth_differs_from_layer_to_layer():
    config = dataclasses.replace(IMAGES, drop_path=0.5)
    model = nnx.jit(lambda: ViT(config, rngs=nnx.Rngs(0)))()
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    call = Call(key=jax.random.key(2), train=True)
    scanned = nnx.eval_shape(lambda: ViT(dataclasses.replace(config, scan=True), rngs=nnx.Rngs(0)))
    state, graph = nnx.split(model)[1], nnx.split(scanned)[0]
    found = jax.jit(lambda s: nnx.merge(graph, s)(images, call=call)[0])(state)
    same(found, jax.jit(lambda x: model(x, call=call)[0])(images))
