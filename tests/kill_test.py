"""Kills training at random moments and goes on: python -m tests.kill_test --runs 200

A job is the real train.py with random draws on. It gets SIGKILL, half of the time while it writes
a checkpoint, and is started again until it ends; then comes the next job. Every start must go on
from the last complete checkpoint, and every job must end with the very log and the one checkpoint
of a job that was never killed.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.train import jobs

ROOT = Path(__file__).resolve().parents[1]
STEPS = {"train": 60, "rates": 20}
FIELDS = (
    *(f"{stage}.steps={steps}" for stage, steps in STEPS.items()),
    "checkpoint.every=3",
    *jobs.FIELDS,
)
LIMIT = 300.0  # seconds that a start may take
POLL = 0.005


class Moment(NamedTuple):
    """When to kill: so many seconds after the start, or `late` seconds after the next checkpoint
    is begun from then on."""

    after: float = float("inf")
    saving: bool = False
    late: float = 0.0


class Outcome(NamedTuple):
    """How a start ended: killed, finished or failed (with what was wrong)."""

    seconds: float
    step: int
    killed: bool = False
    saving: bool = False
    wrong: str = ""


def logged(workdir: Path) -> int:
    """Steps in the log; over all stages, as every step is logged."""
    try:
        return (workdir / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdecimal())


def is_saving(workdir: Path, since: float) -> bool:
    """Whether a checkpoint was begun and is not complete; since: leaves out what others left."""
    for path in workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"):
        try:
            if path.stat().st_mtime >= since:
                return True
        except FileNotFoundError:  # just completed
            continue
    return False


def start(workdir: Path, cache: Path, moment: Moment) -> Outcome:
    """Starts train.py in `workdir` and kills it at `moment`, if it has not ended by then."""
    command = [sys.executable, "train.py", "--config=configs/digits_diffrate.py:smoke"]
    command += [f"--workdir={workdir}", *(f"--config.{field}" for field in FIELDS)]
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said)
        try:
            outcome = watch(process, workdir, moment)
        finally:
            process.kill()
            process.wait()
        if outcome.killed or not process.returncode:
            return outcome
        said.seek(0)
        words = outcome.wrong or f"exit code {process.returncode}"
        return outcome._replace(wrong=f"{words}; it said:\n{said.read()[-2000:]}")


def watch(process: subprocess.Popen, workdir: Path, moment: Moment) -> Outcome:
    """Waits for the end or for `moment` and kills; `wrong` where the log falls behind the last
    complete checkpoint, as it does in a run that starts again from an earlier one."""
    begun, floor, due = time.time(), max(checkpoints(workdir), default=0), float("inf")
    while process.poll() is None:
        now, step = time.time() - begun, logged(workdir)
        if step < floor:
            return Outcome(now, step, wrong=f"went on from step {step} instead of {floor}")
        if now > LIMIT:
            return Outcome(now, step, wrong=f"took more than {LIMIT:.0f} s")
        if now >= moment.after and (not moment.saving or is_saving(workdir, begun)):
            due = min(due, now + moment.late)
        if now >= due:
            process.kill()
            process.wait()
            return Outcome(now, logged(workdir), True, is_saving(workdir, begun))
        time.sleep(POLL)
    return Outcome(time.time() - begun, logged(workdir))


def difference(job: Path, reference: Path) -> str:
    """What a finished job has other than the one that was never killed."""
    if (job / "metrics.jsonl").read_bytes() != (reference / "metrics.jsonl").read_bytes():
        return "metrics.jsonl differs"
    left = sorted(path.name for path in (job / "checkpoints").iterdir())
    return "" if left == [str(sum(STEPS.values()))] else f"checkpoints/ holds {left}"


def measure(reference: Path, job: Path, cache: Path) -> float:
    """Seconds of a job that is not killed and finds everything compiled. Exits unless two jobs that
    were never killed are identical."""
    first, second = (start(workdir, cache, Moment()) for workdir in (reference, job))
    if wrong := first.wrong or second.wrong or difference(job, reference):
        sys.exit(f"jobs that were never killed: {wrong}")
    shutil.rmtree(job)
    print(f"a job that is not killed takes {second.seconds:.1f} s", flush=True)
    return second.seconds


def kill_jobs(root: Path, runs: int, draw: random.Random) -> bool:
    """Kills `runs` times, tells about each, and whether all went well."""
    cache, reference, job = root / "cache", root / "reference", root / "job"
    whole = measure(reference, job, cache)
    kills = continued = finished = identical = 0
    pending = False  # whether the next start follows a kill
    while kills < runs or pending:
        moment = Moment(draw.uniform(0, whole / 2), draw.random() < 0.5, draw.random() / 20)
        outcome = start(job, cache, moment if kills < runs else Moment())
        continued += pending and not outcome.wrong
        pending = outcome.killed
        if outcome.killed:
            kills += 1
            print(
                f"kill {kills}: {outcome.seconds:.2f} s after the start, step {outcome.step} of "
                f"{sum(STEPS.values())}{', while saving' if outcome.saving else ''}",
                flush=True,
            )
            continue
        wrong = outcome.wrong or difference(job, reference)
        finished, identical = finished + 1, identical + (not wrong)
        print(f"job {finished}: {wrong or 'finished, identical'}", flush=True)
        shutil.rmtree(job, ignore_errors=True)
    print(f"{continued} of {kills} continued, {identical} of {finished} finished files identical")
    return continued == kills and identical == finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="how many kills")
    parser.add_argument("--workdir", type=Path, help="where to work; by default a temporary place")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    if args.workdir is not None:
        args.workdir.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.workdir, prefix="kill_test_") as root:
        well = kill_jobs(Path(root).absolute(), args.runs, random.Random(args.seed))
    print(f"{time.monotonic() - begun:.0f} s in all")
    sys.exit(not well)


if __name__ == "__main__":
    main()
