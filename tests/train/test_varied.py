"""Plans that take turns: which, how often, and what a step then does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred.methods import make_plan
from tokred.plan import Layout, Plan
from tokred.train.varied import Varied, vary_options

LAYOUT = Layout(3, 16, 0, (4, 4), False, 16, 2)
PLANS = tuple(make_plan("m3", LAYOUT, scale=scale) for scale in (1, 4, 16))


def run(plan: Plan) -> dict[str, jax.Array]:
    return {
        "tokens": jnp.asarray(LAYOUT.tokens if not plan.steps else plan.steps[0][1].counts(16, 0))
    }


def test_a_step_runs_the_plan_that_its_key_draws():
    varied, seen = Varied(PLANS), []
    for number in range(60):
        key = jax.random.key(number)
        found = int(run(PLANS[int(varied.choose(key, 0))])["tokens"])
        assert int(jax.jit(lambda k: varied(run, k, 0)["tokens"])(key)) == found
        seen.append(found)
    assert set(seen) == {1, 4, 16}


def test_chances_are_the_weights():
    varied = Varied(PLANS, weights=(0.0, 3.0, 1.0))
    keys = jax.random.split(jax.random.key(0), 2000)
    counts = np.bincount(jax.vmap(lambda k: varied.choose(k, 0))(keys), minlength=3)
    assert counts[0] == 0
    assert abs(counts[1] / 2000 - 0.75) < 0.05


def test_all_is_the_mean_over_plans():
    assert float(Varied(PLANS, "all")(run, jax.random.key(0), 0)["tokens"]) == 7.0


def test_stages_follow_the_steps():
    varied = Varied(PLANS, "stages", pivots=(2, 5))
    tokens = [int(varied(run, jax.random.key(0), jnp.asarray(s))["tokens"]) for s in range(7)]
    assert tokens == [1, 1, 4, 4, 4, 16, 16]


def test_options_of_several_names_go_together():
    assert vary_options("length", (1, 2)) == [{"length": 1}, {"length": 2}]
    assert vary_options("layer,stride", ((2, 8), (16, 2))) == [
        {"layer": 2, "stride": 8}, {"layer": 16, "stride": 2},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="must hold one value for each of"):
        vary_options("layer,stride", ((2, 8, 1),))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rule": "turn"}, "train.rule='turn' must be one of"),
        ({"weights": (1.0,)}, "train.weights has 1 numbers for 3 values"),
        ({"rule": "stages", "pivots": (5, 2)}, "must be 2 rising steps"),
        ({"pivots": (5, 2)}, "none with other rules"),
    ],
)
def test_what_does_not_fit_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        Varied(PLANS, **how)


def test_plans_with_running_states_cannot_take_turns():
    steered = make_plan("mrt5", Layout.of_sequence(4, 16, 16, 2))
    with pytest.raises(ValueError, match="has running states"):
        Varied((steered,))
