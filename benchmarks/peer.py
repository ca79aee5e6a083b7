"""Another process, with packages of its own, that runs programs and tells how long they took."""

import json
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Peer:
    """The other process: says what it is, then runs programs by name and tells how long it took.

    python: its interpreter; side: its module; spec: what it builds, as JSON.
    """

    def __init__(self, python: Path, side: str, spec: dict[str, Any]):
        how: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
        command = [str(python.absolute()), "-m", side]
        self._process = subprocess.Popen(command, text=True, **how)
        self.about: dict[str, Any] = json.loads(self._ask(json.dumps(spec)))

    def __call__(self, name: str) -> float:
        """Seconds of one call."""
        return float(self._ask(name))

    def _ask(self, line: str) -> str:
        talk = self._process
        if talk.stdin is None or talk.stdout is None:
            raise RuntimeError("the other process has no pipes.")
        talk.stdin.write(line + "\n")
        talk.stdin.flush()
        answer = talk.stdout.readline()
        if not answer:
            raise RuntimeError(f"the other process ended with exit code {talk.wait()}.")
        return answer

    def close(self) -> None:
        """Ends it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def make_environment(root: Path, packages: Sequence[str]) -> Path:
    """The interpreter of a virtual environment with these packages, made if it is not there."""
    python = root / "bin" / "python"
    if not python.exists():
        venv.create(root, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(command, check=True)
    return python
