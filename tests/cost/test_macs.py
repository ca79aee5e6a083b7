"""The formula against the compiler, and against itself with floats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.methods_table import ROWS
from tokred.cost import compile_cost, compiled_macs, expected_macs, macs
from tokred.cost.bench import forward
from tokred.cost.macs import DENSE
from tokred.methods import make_plan
from tokred.models import ViT, ViTConfig
from tokred.plan import Ask, Plan, Reduction, Site
from tokred.report import Report
from tokred.select import keep_static

# The compiler counts elementwise work too: 3 % at this width, 5.5 % at width 192.
CONFIG = ViTConfig(image_size=(96, 96), patch=(8, 8), width=384, depth=4, heads=6, classes=10)
BATCH = 2


def counted_by_compiler(config: ViTConfig, plan: Plan) -> float:
    f, state = forward(ViT(config, rngs=nnx.Rngs(0)), plan)
    images = jnp.zeros((BATCH, *config.image_size, config.channels))
    return compiled_macs(f, state, images, jax.random.key(0)) / BATCH


@pytest.mark.parametrize("name", [row.method for row in ROWS if row.model == "vit"])
def test_formula_agrees_with_the_compiler(name: str):
    plan = make_plan(name, CONFIG.layout)
    assert macs(CONFIG, plan) == pytest.approx(counted_by_compiler(CONFIG, plan), rel=0.05)


@dataclasses.dataclass(frozen=True)
class Half(Reduction):
    """The first half of the tokens."""

    asks: tuple[Ask, ...] = ()  # type: ignore[misc]

    def counts(self, n: int, prefix: int) -> int:
        return n // 2

    def select(self, tokens, evidence, *, key):
        map_ = keep_static(range(tokens.n // 2), tokens.n, tokens.batch)
        # What is asked for is read, or the compiler would drop it.
        read = sum(jnp.sum(value) for value in evidence.values())
        return dataclasses.replace(map_, index=map_.index + jnp.int32(0 * read))


SITES = ("before", "keys", "inside", "mid", "after", "around", "around_attention", "around_mlp")


@pytest.mark.parametrize("kind", SITES)
def test_every_site_agrees_with_the_compiler(kind: str):
    plan = Plan(((Site(kind, 1), Half()),))
    assert macs(CONFIG, plan) == pytest.approx(counted_by_compiler(CONFIG, plan), rel=0.05)
    assert macs(CONFIG, plan) < macs(CONFIG)


@pytest.mark.parametrize("kind", ["rows", "column_mean", "probs", "keys", "qkv"])
@pytest.mark.parametrize("site", ["mid", "after"])
def test_evidence_agrees_with_the_compiler(kind: str, site: str):
    plan = Plan(((Site(site, 1), Half((Ask(kind),))),))
    assert macs(CONFIG, plan) == pytest.approx(counted_by_compiler(CONFIG, plan), rel=0.05)


def test_overlapping_patches_cost_their_kernel():
    wide = dataclasses.replace(CONFIG, patch_kernel=16)
    assert macs(wide) - macs(CONFIG) == 144 * 3 * 384 * (16**2 - 8**2)


def test_dense_by_hand():
    n, d = 145, 384
    layer = 4 * n * d * d + 2 * n * n * d + 8 * n * d * d
    assert macs(CONFIG) == 144 * 64 * 3 * d + 4 * layer + d * 10


def test_nothing_removed_costs_nothing():
    plan = make_plan("topk", CONFIG.layout, keep=1.0)
    assert macs(CONFIG, plan) == macs(CONFIG)


def test_a_plan_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="outside a model"):
        macs(CONFIG, Plan(((Site("mid", 7), Half()),)))


@dataclasses.dataclass(frozen=True)
class Learned(Reduction):
    """Keeps what its rate says."""

    twins = ("packed", "soft")

    def counts(self, n: int, prefix: int) -> int:
        return n // 2

    def expected_count(self, n, prefix, aux):
        return n * aux["rate"]


def report_of(aux) -> Report:
    return Report(tokens=None, maps={}, sources=(), aux=aux, states={}, evidence={})


@pytest.mark.parametrize("kind", ["mid", "before", "after", "input"])
def test_expected_macs_at_integer_counts_are_the_macs(kind: str):
    site = Site(kind, None if kind == "input" else 1)
    plan = Plan(((site, Learned()),))
    config = dataclasses.replace(CONFIG, class_token=False, pool="mean")
    report = report_of({site.name: {"rate": jnp.float32(0.5)}})
    soft = plan.with_twin("soft")
    assert float(expected_macs(config, soft, report)) == pytest.approx(macs(config, plan), rel=1e-6)
    assert macs(config, soft) == macs(config)


def test_a_rate_feels_its_cost():
    plan = Plan(((Site("mid", 1), Learned()), (Site("mid", 2), Learned()))).with_twin("soft")

    def cost(rates):
        aux = {f"mid_{i + 1}": {"rate": rates[i]} for i in range(2)}
        return expected_macs(CONFIG, plan, report_of(aux))

    rates = jnp.array([0.5, 0.7])
    slope = jax.jit(jax.grad(cost))(rates)
    step = jnp.array([1e-2, 0.0])
    assert (np.asarray(slope) > 0).all() and slope[0] > slope[1]
    difference = (cost(rates + step) - cost(rates - step)) / 2e-2
    assert float(slope[0]) == pytest.approx(float(difference), rel=1e-2)


def test_expected_macs_without_learned_rates_are_the_macs():
    plan = make_plan("tome", CONFIG.layout)
    assert expected_macs(CONFIG, plan, report_of({})) == macs(CONFIG, plan)


def test_a_report_of_another_plan_is_refused():
    plan = Plan(((Site("mid", 1), Learned()),)).with_twin("soft")
    with pytest.raises(ValueError, match="no aux of 'mid_1'"):
        expected_macs(CONFIG, plan, report_of({}))


def test_compiled_costs_of_a_product():
    a = jnp.ones((64, 64))
    cost = compile_cost(jnp.matmul, a, a)
    assert cost.macs == pytest.approx(64**3)
    assert cost.seconds > 0 and cost.temp_bytes >= 0
    np.testing.assert_allclose(cost.run(a, a), a @ a)


def test_dense_is_the_default_plan():
    assert macs(CONFIG) == macs(CONFIG, DENSE) == macs(CONFIG, make_plan("dense", CONFIG.layout))
