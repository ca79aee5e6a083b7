"""The list of methods: what each is, what it needs, and how it becomes a Plan."""

import dataclasses
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from tokred.plan import LayerCount, Layout, Plan, nearest, require_class_token

_METHODS: dict[str, "Method"] = {}


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    make: (layout, *, keep=..., options) -> Plan; `keep` in (0, 1] is the method's scalar budget,
    monotone in cost. needs: such as 'class token' or 'key'. count: 'static' | 'data-dependent'.
    twins: 'none' | 'exact' | 'different' (soft against packed). trains: the twin to train a learned
    method under. golden: case groups 'family/group'.
    """

    name: str
    make: Callable[..., Plan]
    summary: str
    family: str
    site: str
    paper: str = ""
    learned: bool = False
    needs: tuple[str, ...] = ()
    count: str = "static"
    twins: str = "none"
    trains: str = "soft"
    golden: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of what `make` takes beside the layout."""
        parameters = inspect.signature(self.make).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def register(name: str, **about: Any) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Decorates (layout, *, keep, ...) -> Plan; the docstring's first line is the summary.

    Raises:
      ValueError: the name is taken.
    """

    def add(make: Callable[..., Plan]) -> Callable[..., Plan]:
        if name in _METHODS:
            raise ValueError(f"method {name!r} is registered already; choose another name.")
        summary = (make.__doc__ or "").strip().split("\n")[0]
        _METHODS[name] = Method(name, make, summary, **about)
        return make

    return add


def list_methods() -> tuple[Method, ...]:
    """All registered methods, in the order of registration."""
    return tuple(_METHODS.values())


def get_method(name: str) -> Method:
    """The method called `name`. Raises ValueError with the nearest name."""
    if name not in _METHODS:
        raise ValueError(
            f"method {name!r} is unknown{nearest(name, _METHODS) or '; see list_methods().'}"
        )
    return _METHODS[name]


def make_plan(name: str, layout: Layout, **options: Any) -> Plan:
    """The Plan of a method on a model, checked; within the part that the layout is of.

    options: the method's own, and for each of them round_to: the tile edge of the hardware, of
    which every count of tokens, with the prefix, becomes a multiple; `Plan.counts` tells what that
    makes of `keep`.

    Raises:
      ValueError: unknown method or option, keep outside (0, 1], a plan that does not fit, or one
        whose counts do not follow a schedule and are no multiples of `round_to`.
    """
    method, round_to = get_method(name), options.pop("round_to", 1)
    for option in options:
        if option not in method.options:
            known = method.options
            raise ValueError(
                f"method {name!r} has no option {option!r}{nearest(option, known)}; "
                f"its options: {', '.join(known) or 'none'}."
            )
    keep = options.get("keep", 1.0)
    if not (isinstance(keep, (int, float)) and 0 < keep <= 1):
        raise ValueError(
            f"method {name!r}: keep={keep} must lie in (0, 1]; it is a ratio of tokens."
        )
    if "class token" in method.needs:
        require_class_token(f"method {name!r}", layout)
    plan = method.make(dataclasses.replace(layout, round_to=round_to), **options)
    _check_tiles(name, plan.of("").counts(layout.alone), layout, round_to)
    return plan.within(layout.part)


def _check_tiles(name: str, counts: tuple[LayerCount, ...], layout: Layout, round_to: int) -> None:
    for layer, count in enumerate(counts):
        if count.out != layout.tokens and count.out % round_to:
            raise ValueError(
                f"method {name!r}: round_to={round_to} does not divide the {count.out} tokens of "
                f"layer {layer}; its counts do not follow a schedule, so set them by its options."
            )


def golden_passed(method: Method) -> int:
    """How many golden cases of the method's groups the recorded run passed."""
    text = resources.files("tokred.methods").joinpath("golden_passed.json").read_text()
    return sum(json.loads(text).get(group, 0) for group in method.golden)
