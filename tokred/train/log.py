"""What a run tells: a bar for people, JSON lines and TensorBoard event files for tools."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


class LogError(OSError):
    """The log could not be written."""


class RunLog:
    """Writes numbers by step to `workdir`/metrics.jsonl and, if asked, to event files there.

    The lines hold what the seed decides and no times, so that a resumed run ends with the same
    file as an uninterrupted one: of the lines there, those stay for which kept(stage, step).
    write: false in all processes but the first. Use it as a context, so that files are closed.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        kept: Callable[[str, int], bool] = lambda stage, step: True,
        tensorboard: bool = True,
        write: bool = True,
    ):
        self._lines = self._events = None
        if not write:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        _keep_lines(workdir / METRICS, kept)
        self._lines = (workdir / METRICS).open("a")
        self._events = _open_events(workdir) if tensorboard else None

    @classmethod
    def silent(cls) -> "RunLog":
        """One that writes nothing."""
        return cls(Path(), write=False)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: Any) -> None:
        with _naming_the_log():
            for file in (self._lines, self._events):
                if file is not None:
                    file.close()

    def write(self, stage: str, step: int, numbers: Mapping[str, float], **times: float) -> None:
        """One line and one event per number; times go to the events alone.

        Raises LogError where the disk does not take them.
        """
        with _naming_the_log():
            if self._lines is not None:
                line = {"stage": stage, "step": step, **{k: float(v) for k, v in numbers.items()}}
                self._lines.write(json.dumps(line) + "\n")
                self._lines.flush()
            if self._events is not None:
                for name, value in {**numbers, **times}.items():
                    self._events.add_scalar(f"{stage}/{name}", float(value), step)


@contextlib.contextmanager
def _naming_the_log() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LogError(str(error)) from error


def _keep_lines(path: Path, kept: Callable[[str, int], bool]) -> None:
    """Drops later lines, and one that was being written when the run was killed."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    found = [line for line in lines if line.endswith("\n") and kept(*_place(line))]
    if found != lines:
        new = path.with_suffix(".tmp")
        new.write_text("".join(found))
        os.replace(new, path)


def _place(line: str) -> tuple[str, int]:
    fields = json.loads(line)
    return fields["stage"], fields["step"]


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
    """A progress bar of one stage with loss, accuracy, MACs and examples per second; drawn every
    few seconds only where it goes into a file or a notebook."""

    def __init__(self, stage: str, start: int, steps: int, batch: int, *, show: bool = True):
        from tqdm import tqdm

        often = 0.5 if sys.stderr.isatty() else 5.0
        self._bar = tqdm(
            total=steps, initial=start, desc=stage, unit="step", disable=not show, mininterval=often
        )
        self._batch = batch
        self._mark = (time.perf_counter(), start)

    def advance(self) -> None:
        self._bar.update()

    def close(self) -> None:
        self._bar.close()

    def tell(self, step: int, numbers: Mapping[str, float]) -> float:
        """Shows the numbers of `step`; returns examples per second since the last call."""
        now, (before, earlier) = time.perf_counter(), self._mark
        self._mark = (now, step)
        rate = (step - earlier) * self._batch / max(now - before, 1e-9)
        self._bar.set_postfix_str(
            f"loss {numbers['loss']:.3f}, accuracy {100 * numbers['accuracy']:.1f}%, "
            f"MACs {100 * numbers['macs_ratio']:.0f}%, {rate:.0f} examples/s",
            refresh=False,
        )
        return rate
