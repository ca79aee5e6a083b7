"""Rows of finished runs: kept beside them, and read again as long as nothing has changed."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path, of: Mapping[str, Any]) -> list[Row] | None:
    """What `keep_rows` wrote there of the same run; None where it is not finished, or is another.

    of: all that the rows follow from, as JSON has it.
    """
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return kept["rows"] if kept["of"] == json.loads(json.dumps(of)) else None


def keep_rows(path: Path, of: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Written whole or not at all."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps({"of": of, "rows": rows}) + "\n")
    partial.rename(path)


@contextlib.contextmanager
def claim(workdir: Path) -> Iterator[bool]:
    """Whether this process may work there: no other holds it, which ends with the other's block or
    with the process itself."""
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
