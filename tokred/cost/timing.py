"""Time, compared fairly: candidates take turns within one run."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds per call: median, fastest and slowest round."""

    median: float
    low: float
    high: float


def time_rounds(
    functions: Mapping[Any, Callable[[], Any]],
    rounds: int = 10,
    warmup: int = 2,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, Timing]:
    """Every function once per round, a, b, c, a, b, c, ..., so that drift hits all alike.

    Waits for results. seconds: start no further round after this long, but run at least one.

    Raises:
      ValueError: rounds below 1 or warmup below 0.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(
            f"time_rounds: expected rounds >= 1 and warmup >= 0, got {rounds} and {warmup}; "
            "raise them."
        )
    for _ in range(warmup):
        for f in functions.values():
            jax.block_until_ready(f())
    taken: dict[Any, list[float]] = {name: [] for name in functions}
    start = clock()
    for done in range(rounds):
        if done and seconds is not None and clock() - start >= seconds:
            break
        for name, f in functions.items():
            taken[name].append(_time(f, clock))
    return {name: Timing(statistics.median(t), min(t), max(t)) for name, t in taken.items()}


def _time(f: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    jax.block_until_ready(f())
    return clock() - start
