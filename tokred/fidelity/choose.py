"""Which methods are compared, and the plan of each at a budget."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tokred.cost import solve_keep
from tokred.interop import what_fits
from tokred.methods import get_method, list_methods, make_plan
from tokred.plan import Layout, Plan

Options = Mapping[str, Mapping[str, Any]]
ALL = "all"
DENSE = Plan()


class Candidate(NamedTuple):
    """budget: None where the method has none. plan: None where the budget is out of reach, and
    why."""

    method: str
    budget: float | None
    plan: Plan | None
    why: str = ""

    @property
    def about(self) -> dict[str, Any]:
        """How its row begins."""
        return {"method": self.method, "budget": self.budget, "why": self.why}


def check_budgets(budgets: Sequence[float]) -> tuple[float, ...]:
    """Without repetitions. Raises ValueError for one outside (0, 1], or none."""
    if not budgets or not all(0 < b <= 1 for b in budgets):
        raise ValueError(
            f"budgets {list(budgets)} must be shares in (0, 1], such as 0.75,0.5,0.25; change them."
        )
    return tuple(dict.fromkeys(budgets))


def choose_methods(
    model: Any,
    methods: Sequence[str],
    baselines: Sequence[str],
    *,
    cache: bool = False,
    options: Options | None = None,
) -> list[str]:
    """These methods, or for 'all' every one that fits and learns nothing; then the baselines that
    fit. cache: of those for the cache, otherwise of the others. options: see `what_fits`.

    Raises:
      ValueError: an unknown method, one that has to learn first, or one that does not fit.
    """
    mine = lambda name: (get_method(name).site == "cache") == cache  # noqa: E731
    asked = [name for name in dict.fromkeys(methods) if name not in (ALL, "dense")]
    for row in what_fits(model, asked, options) if asked else ():
        _require(model, row, mine(row["method"]), cache)
    more = [m.name for m in list_methods() if not m.learned and m.name != "dense"]
    more = (more if ALL in methods else []) + list(baselines)
    more = [name for name in dict.fromkeys(more) if name not in asked and mine(name)]
    fit = what_fits(model, more, options) if more else []
    return asked + [row["method"] for row in fit if row["fits"]]


def _require(model: Any, row: dict[str, Any], mine: bool, cache: bool) -> None:
    name, kind = row["method"], type(model).__name__
    if row["learned"]:
        raise ValueError(
            f"method {name!r} has to be trained first; compare it by train.py, or leave it out."
        )
    if not row["fits"] or not mine:
        why = row["why"] or f"methods {'for' if cache else 'beside'} the cache are compared here"
        raise ValueError(f"method {name!r} does not fit this {kind}: {why}")


def at_macs(config: Any, name: str, budget: float) -> Candidate:
    """The method at a share of the dense model's MACs; without a budget of its own as it is."""
    if "keep" not in get_method(name).options:
        return Candidate(name, None, make_plan(name, config.layout))
    try:
        return Candidate(name, budget, solve_keep(config, name, budget)[0])
    except ValueError as error:
        return Candidate(name, budget, None, str(error))


def at_share(layout: Layout, name: str, budget: float, **options: Any) -> Candidate:
    """The method with `keep` at the budget; without a budget of its own as it is."""
    if "keep" not in get_method(name).options:
        return Candidate(name, None, make_plan(name, layout, **options))
    try:
        return Candidate(name, budget, make_plan(name, layout, keep=budget, **options))
    except ValueError as error:
        return Candidate(name, budget, None, str(error))


def candidates(
    at: Callable[[str, float], Candidate], names: Sequence[str], budgets: Sequence[float]
) -> list[Candidate]:
    """The dense model, then every method at every budget."""
    each = [at(name, budget) for name in names for budget in check_budgets(budgets)]
    return [Candidate("dense", None, DENSE), *dict.fromkeys(each)]
