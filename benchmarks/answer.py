"""The other process's half of `benchmarks.peer`; needs nothing that is installed."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

REST = 0.3  # seconds in which the threads of torch still spin, and would slow the other side


def hear() -> dict[str, Any]:
    """What to build."""
    return json.loads(sys.stdin.readline())


def answer(programs: Mapping[str, Callable[[], Any]], about: Mapping[str, Any]) -> None:
    """Says what this side is, then runs programs by name, one a line, and tells the seconds."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        programs[line.strip()]()
        taken = time.perf_counter() - start
        time.sleep(REST)
        print(taken, flush=True)
