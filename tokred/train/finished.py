"""Rows of finished runs: kept beside them, and read again as long as nothing has changed; and runs
that several processes share."""

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Row = dict[str, Any]
LOCK, PAUSE = "lock", 5  # seconds between looks for what other processes finish


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
    with open(workdir / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@runtime_checkable
class Run(Protocol):
    """What is trained in a directory of its own."""

    @property
    def workdir(self) -> Path: ...

    @property
    def ready(self) -> bool:
        """Whether what it goes on from is finished."""
        ...


def shared(
    runs: Sequence[Run], rows_of: Callable[[Any], list[Row]]
) -> Iterator[tuple[int, list[Row]]]:
    """(place, rows) of each run as it is finished; what another process works at is left to it, and
    asked for when it is done."""
    left = dict(enumerate(runs))
    while left:
        before = len(left)
        for i, run in list(left.items()):
            if not run.ready:
                continue
            with claim(run.workdir) as mine:
                if mine:
                    yield i, rows_of(run)
                    del left[i]
        if len(left) == before:
            time.sleep(PAUSE)
