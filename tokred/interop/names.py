"""From stored names to paths of parameters and back: a table of templates per family of models."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FEW = 10


class Change(NamedTuple):
    """How a stored array becomes parameters, and how they become it again.

    Of a rule with several paths `read` gives as many arrays and `write` takes a sequence of them.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


def _same(array: Any) -> Any:
    return array


AS_IS = Change(_same, _same)
TRANSPOSE = Change(np.transpose, np.transpose)  # torch's Linear holds (out, in)
CONV = Change(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
INNER = Change(lambda a: a[0], lambda a: a[None])  # a leading axis of 1
OUTER = Change(lambda a: a[None], lambda a: a[0])


def split(parts: int, axis: int = -1, *, transpose: bool = False) -> Change:
    """One stored array that holds several side by side; transpose: each like torch's Linear."""
    turn = np.transpose if transpose else _same
    return Change(
        lambda a: [turn(part) for part in np.split(a, parts, axis)],
        lambda arrays: np.concatenate([turn(a) for a in arrays], axis),
    )


class Rule(NamedTuple):
    """stored: a name in which {i} and {j} stand for numbers · path: of the parameter, with the same
    numbers; several for an array that holds several; None for what is stored twice or not needed ·
    change: of the array."""

    stored: str
    path: str | tuple[str, ...] | None
    change: Change = AS_IS

    @property
    def paths(self) -> tuple[str, ...]:
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, str) else self.path

    def within(self, theirs: str, ours: str) -> "Rule":
        """The same of a part: with these in front of the names."""
        path = self.path
        if path is not None:
            path = ours + path if isinstance(path, str) else tuple(ours + each for each in path)
        return self._replace(stored=theirs + self.stored, path=path)

    def read(self, array: Any) -> list[Any]:
        """The parameters, one for each of the paths."""
        return [self.change.read(array)] if isinstance(self.path, str) else self.change.read(array)

    def write(self, arrays: Sequence[Any]) -> Any:
        """The stored array, of as many parameters."""
        return self.change.write(arrays[0] if isinstance(self.path, str) else arrays)


class Found(NamedTuple):
    """A stored name, its rule, and the paths of the parameters that it holds."""

    name: str
    rule: Rule
    paths: tuple[str, ...]


def find_rules(names: Iterable[str], rules: Sequence[Rule]) -> list[Found]:
    """What every stored name holds.

    Raises:
      ValueError: names that no rule fits.
    """
    found, unknown = [], []
    patterns = [(_pattern(rule.stored), rule) for rule in rules]
    for name in names:
        fits = ((match, rule) for p, rule in patterns if (match := p.fullmatch(name)))
        match, rule = next(fits, (None, None))
        if match is None or rule is None:
            unknown.append(name)
            continue
        numbers = match.groupdict()
        found.append(Found(name, rule, tuple(path.format(**numbers) for path in rule.paths)))
    if unknown:
        raise ValueError(
            f"weights: {len(unknown)} stored names belong to no parameter, {few(unknown)}; load "
            "them into a model of their own family."
        )
    return found


def few(names: Iterable[str]) -> str:
    """The first ten names."""
    every = sorted(names)
    return ", ".join(map(repr, every[:FEW])) + (", ..." if len(every) > FEW else "")


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>[0-9]+)", re.escape(template)))


def linears(theirs: str, ours: str, table: Mapping[str, str]) -> list[Rule]:
    """Weights and biases of torch's Linears by their names behind the two prefixes."""
    rules = []
    for a, b in table.items():
        rules.append(Rule(f"{theirs}{a}.weight", f"{ours}{b}/kernel", TRANSPOSE))
        rules.append(Rule(f"{theirs}{a}.bias", f"{ours}{b}/bias"))
    return rules


def norms(theirs: str, ours: str, table: Mapping[str, str]) -> list[Rule]:
    """Scales and biases of norms."""
    rules = []
    for a, b in table.items():
        rules.append(Rule(f"{theirs}{a}.weight", f"{ours}{b}/scale"))
        rules.append(Rule(f"{theirs}{a}.bias", f"{ours}{b}/bias"))
    return rules


def first_prefix(names: Iterable[str], *prefixes: str) -> str:
    """The first of the prefixes that a name has; the last if none has one."""
    every = tuple(names)
    return next((p for p in prefixes if any(n.startswith(p) for n in every)), prefixes[-1])
