"""From stored names to paths of parameters: a table of patterns per family of models."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """pattern: of a whole stored name · path: of the parameter, with its groups, None for what is
    stored twice or not needed · change: of the array, as it is stored."""

    pattern: str
    path: str | None
    change: Callable[[np.ndarray], np.ndarray] = lambda array: array


def transpose(array: np.ndarray) -> np.ndarray:
    """torch's Linear holds (out, in)."""
    return array.T


def find_rules(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, tuple[str, Rule]]:
    """The stored name and its rule by path of the parameter.

    Raises:
      ValueError: names that no rule fits.
    """
    found, unknown = {}, []
    for name in names:
        rule = next((r for r in rules if re.fullmatch(r.pattern, name)), None)
        if rule is None:
            unknown.append(name)
        elif rule.path is not None:
            found[re.sub(rule.pattern, rule.path, name)] = name, rule
    if unknown:
        raise ValueError(
            f"weights: {len(unknown)} stored names such as {unknown[0]!r} belong to no parameter; "
            "load them into a model of their own family."
        )
    return found
