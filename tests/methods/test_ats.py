"""ATS: which tokens quantiles fall on under both rules, empty slots, overflow, and full keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokred.methods import make_plan
from tokred.methods.ats import ATS, CLASS_ROWS, VALUES, quantiles_of
from tokred.models import ViTConfig
from tokred.nn import Block, Here, run_block
from tokred.plan import Plan, Site
from tokred.report import Call
from tokred.score import score_by_class_value
from tokred.select import as_shares, keep_quantiles
from tokred.tokens import make_tokens

CONFIG = ViTConfig(image_size=(16, 16), patch=(4, 4), width=16, depth=12, heads=2, classes=3)
SCORES = jnp.array([[9.0, 4.0, 1.0, 2.0, 3.0, 0.5], [9.0, 0.1, 0.1, 0.2, 50.0, 0.3]])


def kept(shares, quantiles, k, **how) -> tuple[list[list[int]], list[int]]:
    map_, overflow = keep_quantiles(shares, quantiles, k, prefix=1, **how)
    rows = zip(np.asarray(map_.index), np.asarray(map_.valid), strict=True)
    return [index[alive].tolist() for index, alive in rows], overflow.tolist()


def test_sorted_quantiles_never_meet_the_lowest_and_one_token_may_swallow_many():
    """Stretched sums 0, .1, .3, .6, 1 and quantiles from .1 to 1; then 0, .002, .006, .012, 1."""
    shares = as_shares(SCORES, prefix=1)
    rows, overflow = kept(shares, quantiles_of("official", 5), 5)
    assert rows == [[0, 2, 3, 4, 1], [0, 2, 5, 4]]
    assert overflow == [0, 0]


def test_quantiles_of_tokens_in_their_order():
    """Sums 4, 5, 7, 10, 10.5 of 10.5, and points at 1/8, 3/8, 5/8, 7/8 of 1."""
    shares = as_shares(SCORES, prefix=1)
    rows, _ = kept(shares, quantiles_of("paper", 4), 4, ascending=False)
    assert rows == [[0, 1, 3, 4], [0, 3, 4]]


def test_of_too_many_the_highest_fit():
    rows, overflow = kept(as_shares(SCORES, prefix=1), quantiles_of("official", 5), 2)
    assert rows == [[0, 4, 1], [0, 5, 4]] and overflow == [2, 1]
    in_order = as_shares(SCORES, prefix=1)
    rows, overflow = kept(in_order, quantiles_of("paper", 4), 2, ascending=False)
    assert rows == [[0, 1, 4], [0, 3, 4]] and overflow == [1, 0]


def test_an_empty_slot_frees_the_lowest_token_only_where_asked():
    valid = jnp.array([[True] * 6 + [False]] * 2)
    shares = as_shares(jnp.pad(SCORES, ((0, 0), (0, 1))), prefix=1, valid=valid)
    points = quantiles_of("official", 8)
    rows, _ = kept(shares, points, 6, valid=valid)
    assert rows[0] == [0, 2, 3, 4, 1]
    rows, _ = kept(shares, points, 6, valid=valid, empty_counts=True)
    assert rows[0] == [0, 5, 2, 3, 4, 1]


@pytest.mark.parametrize("value", [0.0, jnp.nan, 1.0])
def test_scores_that_say_nothing_still_leave_a_token(value):
    shares = as_shares(jnp.full((2, 6), value), prefix=1)
    rows, _ = kept(shares, quantiles_of("official", 5), 5)
    assert all(row[0] == 0 and len(row) > 1 for row in rows)


def test_values_of_all_heads_as_one_vector_or_each_by_itself():
    rows = jnp.array([[[0.2, 0.4]]])
    values = jnp.array([[[[3.0, 0.0], [0.0, 4.0]]]])
    np.testing.assert_allclose(score_by_class_value(rows, values), [[0.6 * 5]], rtol=1e-6)
    each = score_by_class_value(rows, values, joint=False)
    np.testing.assert_allclose(each, [[0.2 * 3 + 0.4 * 4]], rtol=1e-6)


@pytest.mark.parametrize("rule", ["official", "paper"])
def test_who_stays_has_looked_at_all_keys(rule):
    """Its row of the block is the one without any reduction."""
    block = Block(16, 2, rngs=nnx.Rngs(0))
    tokens = make_tokens(jax.random.normal(jax.random.key(0), (2, 10, 16)), prefix=1)
    ats = Plan(((Site("inside", 0), ATS(6, quantiles_of(rule, 6), rule)),))
    run = jax.jit(
        lambda t, plan: run_block(Here({0: block}, 0, plan, Call()), t)[:2], static_argnums=1
    )
    out, (record,) = run(tokens, ats)
    whole, _ = run(tokens, Plan())
    np.testing.assert_allclose(
        out.x, record.map.apply(whole.x) + jnp.where(record.map.valid[..., None], 0, out.x),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    assert 2 * 2 < int(record.map.valid.sum()) < 2 * 7
    assert set(record.evidence) == {CLASS_ROWS.name, VALUES.name}


def test_the_published_setting():
    """All patches as quantiles from a quarter of the depth on; nothing leaves but by doubles."""
    plan = make_plan("ats", CONFIG.layout, keep=1.0, samples=16)
    assert [site.layer for site, _ in plan.steps] == list(range(3, 12))
    assert {step for _, step in plan.steps} == {ATS(16, quantiles_of("official", 16))}
    assert plan.counts(CONFIG.layout)[-1].out == 17
    assert make_plan("ats", CONFIG.layout, keep=1.0).steps == ()


def test_bad_options():
    with pytest.raises(ValueError, match="rule='port' must be one of"):
        make_plan("ats", CONFIG.layout, rule="port")
    with pytest.raises(ValueError, match="samples=0 must be at least 1"):
        make_plan("ats", CONFIG.layout, samples=0)
    bare = ViTConfig(image_size=(16, 16), patch=(4, 4), class_token=False, pool="mean")
    with pytest.raises(ValueError, match="needs a class token"):
        make_plan("ats", bare.layout)
