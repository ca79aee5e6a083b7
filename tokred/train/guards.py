"""What stops a run whose numbers are no longer finite, and names where they broke."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from tokred.train.step import FAULTS


class Seen(NamedTuple):
    """What a step was fed: ids of the examples that this process read, and the place after it."""

    ids: list[int]
    place: dict[str, Any]


class NotFiniteError(ValueError):
    """Raised after the last good state was saved."""


class Watch:
    """Remembers what steps were fed until their numbers are known to be finite."""

    def __init__(self, stage: str, start: int):
        self.stage, self._checked = stage, start
        self._seen: dict[int, Seen] = {}

    def saw(self, step: int, ids: Any, place: dict[str, Any]) -> None:
        self._seen[step] = Seen(np.asarray(ids).tolist(), place)

    def place(self, step: int) -> dict[str, Any]:
        """The place in the data after `step`."""
        return self._seen[step].place

    def passed(self, step: int) -> None:
        """Forgets all steps before this one."""
        self._checked = step
        self._seen = {s: seen for s, seen in self._seen.items() if s >= step}

    def error(self, fault: int, good: int, step: int) -> NotFiniteError:
        """good: the last step whose state is finite. step: where the fault was found."""
        what = ", ".join(name for bit, name in enumerate(FAULTS) if fault >> bit & 1)
        ids = self._seen[good + 1].ids
        kept = f"the state after step {good} is saved" if good else "no step was sound"
        return NotFiniteError(
            f"stage {self.stage!r}: {what} not finite at step {good + 1} (found among steps "
            f"{self._checked + 1} to {step}) on the examples {ids}; {kept}; look at "
            "these examples or lower config.optimizer.lr."
        )


def read_metrics(metrics: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """Metrics as floats, and the fault: see `step.FAULTS`. Waits for the step."""
    numbers = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    return numbers, int(numbers.pop("fault"))
