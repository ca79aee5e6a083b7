"""Where the time of a loop goes, and whether anything was compiled again."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
OVERHEAD = ("data", "place", "log", "save")
TRACED = range(10, 20)  # steps after the first in a written trace


class Clock:
    """Seconds per section of a loop, from the end of its first turn, which compiles.

    with clock('data', busy): ... adds to a section, or to 'hidden' if busy() says at its end that
    the device is still at work, so that nothing waited. `clock.compiled` counts the compilations
    within section 'step' after the first turn.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._spent: dict[str, float] = {}
        self._start: float | None = None
        self.turns = self.compiled = 0
        self._compilations = 0

    @contextlib.contextmanager
    def __call__(self, section: str, busy: Callable[[], bool] = lambda: False) -> Iterator[None]:
        before, compilations = self._now(), self._compilations
        try:
            yield
        finally:
            spent, name = self._now() - before, "hidden" if busy() else section
            self._spent[name] = self._spent.get(name, 0.0) + spent
            if section == "step" and self._start is not None:
                self.compiled += self._compilations - compilations

    def turn(self) -> None:
        """Ends a turn of the loop; the first one is forgotten."""
        if self._start is None:
            self._start, self._spent = self._now(), {}
        else:
            self.turns += 1

    def summary(self) -> dict[str, float]:
        """Milliseconds per turn in all and by section, and 'overhead': the share of the time that
        the loop takes for `OVERHEAD` while the device has nothing to do."""
        total = 0.0 if self._start is None else self._now() - self._start
        per_turn = 1e3 / max(self.turns, 1)
        sections = {f"{name}_ms": per_turn * s for name, s in sorted(self._spent.items())}
        lost = sum(self._spent.get(name, 0.0) for name in OVERHEAD)
        return {
            "steps": self.turns,
            "turn_ms": per_turn * total,
            "overhead": lost / total if total else 0.0,
            "compilations": self.compiled,
            **sections,
        }

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Listens to the compiler."""

        def heard(event: str, duration_secs: float, **about: Any) -> None:
            self._compilations += event == COMPILED

        jax.monitoring.register_event_duration_secs_listener(heard)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(heard)


class Tracer:
    """Writes what the device did in the steps `TRACED` to `path`, for TensorBoard or XProf."""

    def __init__(self, path: Path | None):
        self._path, self._running = path, False

    def __call__(self, turn: int) -> None:
        """Before a turn of the loop."""
        if self._path is None:
            return
        if turn == TRACED.start:
            jax.profiler.start_trace(str(self._path))
            self._running = True
        elif turn == TRACED.stop:
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
        self._running = False


def format_summary(stage: str, summary: Mapping[str, float]) -> str:
    """One line for people."""
    parts = [
        f"{name} {100 * summary.get(f'{name}_ms', 0.0) / max(summary['turn_ms'], 1e-9):.2f}"
        for name in OVERHEAD
    ]
    return (
        f"{stage}: {summary['steps']:.0f} steps of {summary['turn_ms']:.1f} ms; loop overhead "
        f"{100 * summary['overhead']:.2f} % ({', '.join(parts)}); "
        f"compiled again after the first step: {summary['compilations']:.0f}"
    )
