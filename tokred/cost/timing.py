"""Time, compared fairly: candidates take turns within one run."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds per call: median, fastest and slowest round, of so many `rounds`. pipelined: with
    several calls under way, None where that was not asked for."""

    median: float
    low: float
    high: float
    rounds: int
    pipelined: float | None = None


@dataclass(frozen=True)
class Rounds:
    """How to time. count: rounds, in each of which every function runs once. seconds: no further
    round starts after this long, but one is run. ahead: behind these rounds, so many calls of each
    are started before the first is waited for."""

    count: int = 10
    seconds: float | None = None
    ahead: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.ahead < 0:
            raise ValueError(
                f"Rounds: expected count >= 1 and ahead >= 0, got {self.count} and {self.ahead}; "
                "raise them."
            )


def time_rounds(
    functions: Mapping[Any, Callable[[], Any]],
    rounds: int | Rounds = 10,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, Timing]:
    """Every function once per round, a, b, c, a, b, c, ..., so that drift hits all alike.

    Waits for results. rounds: a number, or `Rounds`. warmup: calls of each that are not timed.

    Raises:
      ValueError: rounds below 1 or warmup below 0.
    """
    how = rounds if isinstance(rounds, Rounds) else Rounds(rounds)
    if warmup < 0:
        raise ValueError(f"time_rounds: expected warmup >= 0, got {warmup}; raise it.")
    for _ in range(warmup):
        for f in functions.values():
            jax.block_until_ready(f())
    taken: dict[Any, list[float]] = {name: [] for name in functions}
    start = clock()
    for done in range(how.count):
        if done and how.seconds is not None and clock() - start >= how.seconds:
            break
        for name, f in functions.items():
            taken[name].append(_time(f, clock))
    times = {n: Timing(statistics.median(t), min(t), max(t), len(t)) for n, t in taken.items()}
    for name, f in functions.items() if how.ahead else ():
        taking = _time(lambda f=f: [f() for _ in range(how.ahead)], clock)
        times[name] = times[name]._replace(pipelined=taking / how.ahead)
    return times


def _time(f: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    jax.block_until_ready(f())
    return clock() - start
