"""Reductions around several layers: what runs on which tokens, and how all come back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.test_layers import runs, same
from tests.models.test_sites import B, Look, Pairs, Pick, _layer, pick
from tokred.combine import Combine
from tokred.cost import expected_macs, macs
from tokred.maps import Assign, Keep
from tokred.methods.mod import MoD
from tokred.models import Decoder, DecoderConfig, ViT, ViTConfig
from tokred.nn.layers import Layers
from tokred.plan import Ask, LayerCount, Plan, Reduction, Site
from tokred.report import Call, Report

CONFIG = ViTConfig(image_size=(8, 12), patch=(4, 4), width=16, depth=6, heads=2, classes=3)
N = 7
MODEL = nnx.jit(lambda: ViT(CONFIG, rngs=nnx.Rngs(0)))()
IMAGES = jax.random.normal(jax.random.key(0), (B, 8, 12, 3))
TEXT = DecoderConfig(vocab=7, width=8, depth=6, heads=2, hidden=8, context=10)
IDS = jax.random.randint(jax.random.key(0), (2, 10), 0, 7)
FEW = (0, 3, 2)


@dataclasses.dataclass(frozen=True)
class Around(Pick):
    """Puts back in a way of its own: by `combine`."""

    how: Any = None

    def __call__(self, tokens, evidence, state=None, **more: Any):
        map_ = self.select(tokens, evidence, key=None)
        return self.move(tokens, map_, evidence), map_, state, {"combine": self.how(tokens)}


@dataclasses.dataclass(frozen=True)
class Chance(Reduction):
    """All tokens enter; reports what its key draws."""

    twins = ("packed", "causal")

    def counts(self, n: int, prefix: int) -> int:
        return n

    def __call__(self, tokens, evidence, state=None, *, key: Any = None, **more: Any):
        return tokens, None, state, {"draw": jax.random.uniform(key)}


def run(*steps: tuple[Site, Reduction], call: Call | None = None) -> Report:
    plan = Plan(steps)
    graph, state = nnx.split(MODEL)
    forward = lambda s: nnx.merge(graph, s)(IMAGES, plan=plan, call=call)[1]  # noqa: E731
    return jax.jit(forward)(state)


def close(report: Report, x: Any) -> None:
    np.testing.assert_allclose(report.tokens.x, MODEL.norm(x), rtol=1e-3, atol=1e-4)


def through(x: Any, layers: range) -> Any:
    for layer in layers:
        x = _layer(x, MODEL.blocks[layer])
    return x


START = MODEL.tokens(IMAGES).x


def test_a_span_by_hand():
    report = run((Site("around", 1, 3), Pick()))
    x = through(START, range(1))
    x = x.at[:, jnp.array([0, 5, 2, 4])].set(through(pick(x), range(1, 4)))
    close(report, through(x, range(4, 6)))
    assert report.tokens.source is None and set(report.maps) == {"around_1_3"}
    assert report.counts[0] == LayerCount(N, N, N, N) == report.counts[4]
    assert report.counts[1] == LayerCount(4, 4, 4, 4) == report.counts[2]
    assert report.counts[3] == LayerCount(4, 4, 4, N)
    where = np.where(np.isin(np.arange(N), [0, 5, 2, 4]), [0, -1, 2, -1, 3, 1, -1], -1)
    for layer in range(6):
        wanted = where if layer in (1, 2, 3) else np.arange(N)
        np.testing.assert_array_equal(report.sources[layer], np.broadcast_to(wanted, (B, N)))


def test_merged_tokens_share_their_update():
    report = run((Site("around", 2, 5), Pairs()))
    x = through(START, range(2))
    target = jnp.array([0, 1, 1, 2, 2, 3, 4])
    map_ = Assign(jnp.broadcast_to(target, (B, N)), N - 2)
    entered = map_.apply(x)
    close(report, x + map_.restore(through(entered, range(2, 6)) - entered))


def test_spans_may_be_nested():
    """Two that begin together, and one layer's own at the end of the outer."""
    steps = (
        (Site("around", 1, 4), Pick()),
        (Site("around", 1, 2), Pick(index=FEW)),
        (Site("around", 4), Pick(index=(0, 1))),
    )
    report = run(*steps)
    x = through(START, range(1))
    kept, few = pick(x), jnp.array(FEW)
    inner = kept.at[:, few].set(through(kept[:, few], range(1, 3)))
    inner = through(inner, range(3, 4))
    inner = inner.at[:, :2].set(through(inner[:, :2], range(4, 5)))
    x = x.at[:, jnp.array([0, 5, 2, 4])].set(inner)
    close(report, through(x, range(5, 6)))
    assert [count.queries for count in report.counts] == [N, 3, 3, 4, 2, N]
    assert [count.out for count in report.counts] == [N, 3, 4, 4, N, N]
    assert set(report.maps) == {"around_1_4", "around_1_2", "around_4"}
    shuffled = run(*reversed(steps))
    np.testing.assert_array_equal(shuffled.tokens.x, report.tokens.x)


def test_a_span_of_one_layer_is_that_layer():
    assert Site("around", 2, 2) == Site("around", 2) != Site("around", 2, 3)
    assert Site("around", 2, 3).name == "around_2_3" and Site("input").layers == range(0)


def test_nobody_enters():
    report = run((Site("around", 1, 4), Pick(index=())))
    close(report, through(through(START, range(1)), range(5, 6)))
    assert [len(report.sources), report.counts[2].mlp] == [6, 0]


def test_the_sites_of_the_first_and_last_layer_lie_inside():
    report = run(
        (Site("around", 1, 2), Pick()),
        (Site("before", 1), Look((Ask("hidden"),))),
        (Site("after", 2), Look((Ask("hidden"),))),
    )
    assert report.evidence["before_1"]["hidden"].shape == (B, 4, 16)
    assert report.evidence["after_2"]["hidden"].shape == (B, 4, 16)


def test_evidence_at_a_span_is_its_first_layers():
    report = run((Site("around", 1, 2), Pick((Ask("rows"), Ask("normed"), Ask("input")))))
    found, x = report.evidence["around_1_2"], through(START, range(1))
    np.testing.assert_allclose(found["normed"], MODEL.blocks[1].norm1(x), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["input"], x, rtol=1e-3, atol=1e-4)
    assert found["rows_cls"].shape == (B, N)


@pytest.mark.parametrize("fill", [False, True])
def test_a_way_back_of_its_own(fill: bool):
    """Another map, to which what came out belongs; added to `fill`, or to nothing."""
    target = jnp.broadcast_to(jnp.array([0, 0, 1, 1, 2, 3, 9]), (B, N))

    def how(tokens):
        return Combine(fill=3 * tokens.x if fill else None, restore=Assign(target, 4))

    report = run((Site("around", 1, 3), Around(how=how)))
    x = through(START, range(1))
    back = Assign(target, 4).restore(through(pick(x), range(1, 4)))
    close(report, through(3 * x + back if fill else back, range(4, 6)))


def test_weights_act_before_the_way_back():
    x, before, after = jax.random.normal(jax.random.key(0), (3, 1, 2, 4))
    restore = Keep(jnp.array([[1, 0]]), 2)
    combine = Combine(jnp.full((1, 2), 0.25), restore=restore)
    wanted = (before + 0.25 * (after - before))[:, ::-1]
    np.testing.assert_allclose(combine.put_back(x, before, after, None), wanted, rtol=1e-6)


def test_every_span_draws_its_own_key():
    sites = (Site("around", 1, 3), Site("around", 1, 2), Site("around", 1), Site("around", 4, 5))
    report = run(*((site, Chance()) for site in sites), call=Call(key=jax.random.key(0)))
    draws = [float(report.aux[site.name]["draw"]) for site in sites]
    assert len(set(draws)) == 4


SPAN = Plan(((Site("around", 1, 4), Pick()), (Site("around", 2, 3), Pick(index=FEW))))
LONG = Plan(((Site("around", 1, 4), Pick()),))


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (LONG, [(0, 1, 1), (1, 1, 4), (5, 1, 1)]),
        (SPAN, [(0, 1, 1), (1, 1, 1), (2, 1, 2), (4, 1, 1), (5, 1, 1)]),
        (Plan(((Site("around", 0, 5), Pick()),)), [(0, 1, 6)]),
    ],
)
def test_layers_of_a_span_are_scanned_together(plan: Plan, expected: list):
    assert [tuple(run) for run in runs(TEXT, plan)] == expected


@pytest.mark.parametrize("plan", [LONG, SPAN])
@pytest.mark.parametrize("remat", [0, 6])
def test_scanned_is_unrolled(plan: Plan, remat: int):
    state = nnx.split(nnx.jit(lambda: Decoder(TEXT, rngs=nnx.Rngs(0)))())[1]

    def outcome(scan: bool, remat: int) -> Any:
        config = dataclasses.replace(TEXT, scan=scan)
        graph = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]

        def forward(state: Any, ids: Any) -> Any:
            call = Call(key=jax.random.key(1), remat=remat)
            logits, report = nnx.merge(graph, state)(ids, plan=plan, call=call)
            return logits.var(), report

        return jax.jit(jax.grad(forward, has_aux=True))(state, IDS)

    (found, report), (wanted, plain) = outcome(True, remat), outcome(False, 0)
    same(found, wanted)
    same(report.sources, plain.sources)
    assert report.maps.keys() == plain.maps.keys()


def test_a_cache_under_a_span():
    """Where every token decides alone; else the pass must be whole."""
    model = nnx.jit(lambda: Decoder(TEXT, rngs=nnx.Rngs(0)))()
    plan = Plan(((Site("around", 1, 4), Chance()),), twin="causal")
    call, cache = Call(key=jax.random.key(0)), model.make_cache(2, 10, plan=plan)
    full, _ = model(IDS, plan=plan, call=call)
    first, cache, _ = model.extend(IDS[:, :6], cache, plan=plan, call=call, fresh=True)
    last, _, _ = model.extend(IDS[:, 6:], cache, plan=plan, call=call)
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), full, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"Pick at around_1_4 .*decode by full passes"):
        model.extend(IDS, model.make_cache(2, 10), plan=LONG, call=call)


def test_tokens_that_decide_skip_a_whole_span():
    """Mixture-of-Depths around three layers: what skips has no entry in any of their caches."""
    plan = Plan(((Site("around", 1, 3), MoD(0.5, cache=0.8)),))
    model = nnx.jit(lambda: Decoder(TEXT, plan=plan, rngs=nnx.Rngs(3)))()
    causal, cache = plan.with_twin("causal"), model.make_cache(2, 10, plan=plan)
    assert [layer.capacity for layer in cache.layers] == [10, 8, 8, 8, 10, 10]
    full, report = model(IDS, plan=causal)
    first, cache, _ = model.extend(IDS[:, :6], cache, plan=causal, fresh=True)
    last, cache, _ = model.extend(IDS[:, 6:], cache, plan=causal)
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), full, rtol=1e-4, atol=1e-5)
    entered = np.asarray(report.entered["around_1_3"]).sum(-1)
    assert (entered < 10).any() and not any(layer.dropped.any() for layer in cache.layers)
    for layer in range(6):
        wanted = entered if layer in (1, 2, 3) else [10, 10]
        np.testing.assert_array_equal(cache.occupancy()[:, layer], wanted)


@dataclasses.dataclass(frozen=True)
class Learned(Pick):
    """As many as its rate says."""

    twins = ("packed", "soft")

    def expected_count(self, n, prefix, aux):
        return n * aux["rate"]


def test_costs_are_those_of_the_tokens_inside():
    n, out = CONFIG.layout.tokens, CONFIG.outer_macs(N)
    assert n == N
    layer = lambda k: CONFIG.layer_macs(k, k, k, k)  # noqa: E731
    assert macs(CONFIG, LONG) == out + 2 * layer(N) + 4 * layer(4)
    assert macs(CONFIG, SPAN) == out + 2 * layer(N) + 2 * layer(4) + 2 * layer(3)
    plan = Plan(((Site("around", 1, 4), Learned()),)).with_twin("soft")
    aux = {"around_1_4": {"rate": jnp.float32(4 / 7)}}
    report = Report(tokens=None, maps={}, sources=(), aux=aux, states={}, evidence={})
    assert float(expected_macs(CONFIG, plan, report)) == pytest.approx(macs(CONFIG, LONG), rel=1e-6)


def branch(tokens: Any) -> Combine:
    return Combine(rule="mlp_branch", weight=jnp.ones((B, 4)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Site("mid", 1, 3), "until=3 must be a layer from layer=1 on, at a site 'around'"),
        (lambda: Site("around", 3, 1), "until=1 must be a layer from layer=3"),
        (lambda: Site("input", until=1), "until=1"),
        (
            lambda: Plan(((Site("around", 0, 2), Pick()), (Site("around", 2, 4), Pick()))),
            "spans around_0_2 and around_2_4 overlap",
        ),
        (lambda: Plan(((Site("around", 0, 2), Pick()),) * 2), "around_0_2 and around_0_2 overlap"),
        (lambda: Plan(((Site("around", 4, 6), Pick()),)).counts(CONFIG.layout), "lies outside"),
        (
            lambda: run((Site("around", 1, 3), Pick()), (Site("mid", 2), Pick(index=FEW))),
            "4 tokens enter the span around_1_3 and 3 come out",
        ),
        (lambda: run((Site("around", 1, 3), Around(how=branch))), "cannot stand at around_1_3"),
    ],
)
def test_mistakes(make: Any, match: str):
    with pytest.raises(ValueError, match=match) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_part_of_a_span_cannot_run_alone():
    layers, tokens = Layers(MODEL.blocks), MODEL.tokens(IMAGES)
    plan = Plan(((Site("around", 1, 3), Pick()),))
    counts = plan.counts(CONFIG.layout)
    with pytest.raises(ValueError, match=r"only layers 0\.\.2 run, a part of the span around_1_3"):
        layers(tokens, plan, Call(), counts, only=range(3))
    ran = layers(tokens, plan, Call(), counts, only=range(4))
    np.testing.assert_array_equal(ran.tokens.sources(), tokens.sources())
