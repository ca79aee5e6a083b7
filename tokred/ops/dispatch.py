"""Choice of an implementation by name."""

from collections.abc import Callable, Mapping


def choose(op: str, name: str | None, table: Mapping[str, Callable], default: str) -> Callable:
    """The entry of `table` called `name`; None takes `default`.

    Raises:
      ValueError: no entry has that name.
    """
    picked = default if name is None else name
    if picked not in table:
        raise ValueError(
            f"ops.{op}: implementation={name!r} is unknown; choose one of {sorted(table)} or None."
        )
    return table[picked]
