"""Counts raised to the tile edges of the hardware."""

import jax
import pytest
from flax import nnx

from tokred import ViT, ViTConfig, make_plan
from tokred.cost.budget import solve_keep

CONFIG = ViTConfig(image_size=(56, 56), patch=(8, 8), width=24, depth=6, heads=2, classes=5)
STAGED = (
    "topk", "random", "evit", "tome", "tome_random", "pitome", "mctf", "zero_tprune", "ats",
    "dynamicvit", "sit", "patchmerger", "tokencut", "dpc_knn", "k_medoids",
)  # fmt: skip


def counts(name: str, **options) -> list[int]:
    return [row.out for row in make_plan(name, CONFIG.layout, **options).counts(CONFIG.layout)]


@pytest.mark.parametrize("edge", [4, 8])
@pytest.mark.parametrize("name", STAGED)
def test_counts_are_the_next_multiples(name: str, edge: int):
    plain, rounded = counts(name, keep=0.6), counts(name, keep=0.6, round_to=edge)
    assert all(n % edge == 0 for n in rounded if n < CONFIG.layout.tokens)
    assert all(0 <= more - n < edge for n, more in zip(plain, rounded, strict=True))
    assert rounded[-1] < CONFIG.layout.tokens


def test_removals_given_by_number_are_rounded_too():
    assert counts("tome", r=5) == [45, 40, 35, 30, 25, 20]
    assert counts("tome", r=5, round_to=8) == [48, 40, 40, 32, 32, 24]


@pytest.mark.parametrize("name", ["evit", "tome"])
def test_the_model_runs_at_the_counts(name: str):
    plan = make_plan(name, CONFIG.layout, keep=0.5, round_to=8)
    images = jax.random.normal(jax.random.key(0), (2, 56, 56, 3))
    last = lambda model, x: model.encode(model.tokens(x), plan=plan)[0]  # noqa: E731
    tokens = nnx.eval_shape(last, ViT(CONFIG, rngs=nnx.Rngs(0)), images)
    assert tokens.n == plan.counts(CONFIG.layout)[-1].out


def test_a_target_of_macs_is_met_at_multiples():
    plan, _ = solve_keep(CONFIG, "topk", 0.7, round_to=8)
    assert all(row.out % 8 == 0 for row in plan.counts(CONFIG.layout)[1:])


def test_counts_of_no_schedule_are_refused():
    with pytest.raises(ValueError, match="'uniform': round_to=8 does not divide the"):
        counts("uniform", keep=0.5, round_to=8)
