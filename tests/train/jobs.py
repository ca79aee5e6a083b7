"""Runs of train.py in processes of their own, for test_survival.py."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "configs/digits_diffrate.py:smoke"
FIELDS = (
    "log.every=1",
    "log.progress=False",
    "log.tensorboard=False",
    "evaluate.methods=()",
    "model.drop_path=0.1",
    "loss.mixup=0.2",
    "optimizer.ema=0.9",
)
PATIENCE = 240.0  # seconds


class Done(NamedTuple):
    code: int
    said: str
    complained: str

    def sentence(self) -> str:
        """The one error that a user reads; libraries may have written around it."""
        found = re.findall(r"\berror: (.+)", self.complained)
        assert len(found) == 1, self.complained
        return found[0]


def start(
    workdir: Path, *fields: str, devices: int = 2, flags: Sequence[str] = (), **how: Any
) -> subprocess.Popen:
    """train.py on so many devices with these fields of the config; how: of Popen."""
    config = (f"--config.{field}" for field in (*FIELDS, *fields))
    command = [sys.executable, "train.py", f"--config={RECIPE}", f"--workdir={workdir}"]
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *flags, *config], cwd=ROOT, env=env, **pipe, **how)


def finish(*running: subprocess.Popen) -> list[Done]:
    """How each ended; all are killed where one takes too long."""
    try:
        said = [process.communicate(timeout=PATIENCE) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [Done(p.returncode, *words) for p, words in zip(running, said, strict=True)]


def run(workdir: Path, *fields: str, **how: Any) -> Done:
    return finish(start(workdir, *fields, **how))[0]


def succeed(workdir: Path, *fields: str, **how: Any) -> Path:
    """The workdir of a run that must end with exit code 0."""
    done = run(workdir, *fields, **how)
    assert done.code == 0, done.complained
    return workdir


def stop_midway(running: subprocess.Popen, workdir: Path, lines: int = 5) -> None:
    """SIGTERM, once so many steps are logged."""
    wait_for(lambda: len(read_steps(workdir)) >= lines, running)
    running.send_signal(signal.SIGTERM)


def wait_for(reached: Callable[[], bool], running: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE
    while not reached():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def read_log(workdir: Path) -> bytes:
    path = workdir / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


def read_steps(workdir: Path) -> dict[tuple[str, int], float]:
    """Losses by (stage, step); a line that is being written does not count."""
    lines = read_log(workdir).decode().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {(row["stage"], row["step"]): row["loss"] for row in rows}


def checkpoints(workdir: Path) -> list[int]:
    """All complete steps."""
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdecimal())
