"""Targets become budgets."""

import pytest

from tests.methods_table import ROWS
from tokred.cost import macs, solve_keep
from tokred.cost.budget import STEPS
from tokred.methods import make_plan
from tokred.models import ViTConfig

CONFIG = ViTConfig(image_size=(96, 96), patch=(8, 8), width=64, depth=4, heads=2, classes=10)
METHODS = [row.method for row in ROWS if row.model == "vit" and row.method != "dense"]


@pytest.mark.parametrize("name", METHODS)
def test_the_largest_keep_under_the_target(name: str):
    dense = macs(CONFIG)
    lowest = 0.0
    for ratio in (0.9, 0.8, 0.7):
        plan, keep = solve_keep(CONFIG, name, ratio)
        assert macs(CONFIG, plan) <= ratio * dense
        more = make_plan(name, CONFIG.layout, keep=min(1.0, keep + 1 / STEPS))
        assert macs(CONFIG, more) > ratio * dense
        assert keep <= (lowest or 1.0)
        lowest = keep


@pytest.mark.parametrize("name", METHODS)
def test_cost_is_monotone_in_keep(name: str):
    plans = [make_plan(name, CONFIG.layout, keep=keep / 20) for keep in range(6, 21)]
    costs = [macs(CONFIG, plan) for plan in plans]
    # DiffRate's similarities cost more than a few merged tokens save; keep=1 computes none.
    assert costs[:-1] == sorted(costs[:-1])


# ACM has learners in place of MLPs whatever it keeps, KARL asks its head, LookupViT has a stream.
OTHERS = ("acm", "karl", "lookupvit")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OTHERS])
def test_a_ratio_of_one_keeps_all(name: str):
    plan, keep = solve_keep(CONFIG, name, 1.0)
    assert keep == 1.0
    assert macs(CONFIG, plan) == macs(CONFIG)


@pytest.mark.parametrize("name", METHODS)
def test_an_unreachable_target_names_the_range(name: str):
    with pytest.raises(ValueError, match=r"choose a ratio in \[0\.\d+, 1\.0\]") as error:
        solve_keep(CONFIG, name, 0.001)
    lowest = float(str(error.value).split("[")[1].split(",")[0])
    plan, _ = solve_keep(CONFIG, name, lowest + 0.001)
    assert macs(CONFIG, plan) <= (lowest + 0.001) * macs(CONFIG)


def test_options_pass_through():
    plan, _ = solve_keep(CONFIG, "topk", 0.8, layers=[1])
    assert [site.layer for site, _ in plan.steps] == [1]


def test_errors():
    with pytest.raises(ValueError, match="leave it out"):
        solve_keep(CONFIG, "topk", 0.8, keep=0.5)
    with pytest.raises(ValueError, match="unknown; did you mean 'tome'"):
        solve_keep(CONFIG, "tme", 0.8)
    with pytest.raises(ValueError, match="no option 'layer'"):
        solve_keep(CONFIG, "topk", 0.8, layer=[1])
    with pytest.raises(ValueError, match="cannot cost"):
        solve_keep(CONFIG, "dense", 0.8)
