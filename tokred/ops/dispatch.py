"""Choice of an implementation by name, and a list of what was chosen."""

import contextlib
import contextvars
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple


class Choice(NamedTuple):
    """used: the implementation of `op` that a program got. why: it is not the one asked for."""

    op: str
    used: str
    why: str = ""


_CHOICES: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar(
    "choices", default=None
)
_PREFERRED: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar(
    "preferred", default=MappingProxyType({})
)


@contextlib.contextmanager
def watch_choices() -> Iterator[list[Choice]]:
    """A list that gets every choice made while a program is traced."""
    found: list[Choice] = []
    token = _CHOICES.set(found)
    try:
        yield found
    finally:
        _CHOICES.reset(token)


def note(op: str, used: str, why: str = "") -> None:
    """Tells what was chosen. why: the name that was asked for, and what it lacks; warned of, once
    for each."""
    found = _CHOICES.get()
    if found is not None:
        found.append(Choice(op, used, why))
    if why:
        warnings.warn(f"ops.{op}: {why}; {used!r} is used instead.", stacklevel=3)


@contextlib.contextmanager
def prefer(**implementations: str) -> Iterator[None]:
    """Programs traced inside take these implementations, by name of the operation, where a call
    names none: prefer(segment_sum="one_hot")."""
    token = _PREFERRED.set({**_PREFERRED.get(), **implementations})
    try:
        yield
    finally:
        _PREFERRED.reset(token)


def preferred(op: str, default: str) -> str:
    """What calls of `op` take that name no implementation."""
    return _PREFERRED.get().get(op, default)


def choose(op: str, name: str | None, table: Mapping[str, Callable], default: str) -> Callable:
    """The entry of `table` called `name`; None takes what is preferred, or `default`.

    Raises:
      ValueError: no entry has that name.
    """
    picked = preferred(op, default) if name is None else name
    if picked not in table:
        raise ValueError(
            f"ops.{op}: implementation={name!r} is unknown; choose one of {sorted(table)} or None."
        )
    return table[picked]
