"""What a run tells: a bar for people, JSON lines and TensorBoard event files for tools."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class RunLog:
    """Writes numbers by step to `workdir`/metrics.jsonl and, if asked, to event files there.

    Use it as a context, so that both are closed.
    """

    def __init__(self, workdir: Path, *, tensorboard: bool = True):
        workdir.mkdir(parents=True, exist_ok=True)
        self._lines = (workdir / "metrics.jsonl").open("a")
        self._events = _open_events(workdir) if tensorboard else None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self._lines.close()
        if self._events is not None:
            self._events.close()

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """One line and one event per number; step counts within the stage."""
        line = {"stage": stage, "step": step, **{k: float(v) for k, v in numbers.items()}}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(f"{stage}/{name}", float(value), step)


def _open_events(workdir: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError(
            "config.log.tensorboard needs tensorboardX: pip install 'tokred[train]', or set "
            "--config.log.tensorboard=False."
        ) from None
    return SummaryWriter(str(workdir))


class Progress:
    """A progress bar of one stage with loss, accuracy, MACs and images per second."""

    def __init__(self, stage: str, start: int, steps: int, batch: int, *, show: bool = True):
        from tqdm import tqdm

        self._bar = tqdm(
            total=steps, initial=start, desc=stage, unit="step", disable=not show, mininterval=0.5
        )
        self._batch = batch
        self._mark = (time.perf_counter(), start)

    def advance(self) -> None:
        self._bar.update()

    def close(self) -> None:
        self._bar.close()

    def tell(self, step: int, numbers: Mapping[str, float]) -> dict[str, float]:
        """Shows the numbers of `step`; returns them with 'images_per_s' since the last call."""
        now, (before, earlier) = time.perf_counter(), self._mark
        self._mark = (now, step)
        rate = (step - earlier) * self._batch / max(now - before, 1e-9)
        self._bar.set_postfix_str(
            f"loss {numbers['loss']:.3f}, accuracy {100 * numbers['accuracy']:.1f}%, "
            f"MACs {100 * numbers['macs_ratio']:.0f}%, {rate:.0f} images/s"
        )
        return {**numbers, "images_per_s": rate}
