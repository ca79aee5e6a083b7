"""What the scripts share: arguments, and errors of the user as one sentence with exit code 2."""

import argparse
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tokred.plan import nearest

PREFIX = "--config."
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


class Stopped(Exception):  # noqa: N818, for it is no error
    """The job ends early as it was told to, with its state saved."""


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors of one sentence with the nearest name."""

    def error(self, message: str) -> Any:
        raise ValueError(f"{message}; see --help.")

    def read(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The arguments, and 'a.b=value' for every --config.a.b=value."""
        known, rest = self.parse_known_args(list(argv))
        for word in rest:
            if not (word.startswith(PREFIX) and "config" in known):
                names = [s for action in self._actions for s in action.option_strings]
                hint = nearest(word.split("=")[0], names) or "; see --help."
                raise ValueError(f"argument {word!r} is unknown{hint}")
        return known, [word.removeprefix(PREFIX) for word in rest]


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Calls main(arguments), by default those of the process; a user's error ends in one sentence
    on stderr and exit code 2.

    A run that SIGTERM stopped has saved its state and ends with exit code 0. TOKRED_TRACEBACK=1
    shows where an error came from. Ctrl-C ends with exit code 130.
    """
    if not os.environ.get("TOKRED_TRACEBACK"):
        _hush()
    try:
        main(sys.argv[1:] if argv is None else argv)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
    except USER_ERRORS as error:
        if os.environ.get("TOKRED_TRACEBACK"):
            raise
        sentence = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


def _hush() -> None:
    """Silences threads that fail in the background, as writers do on a full disk: what they met is
    raised where it is waited for, and told in one sentence."""
    threading.excepthook = lambda failed: None
    plain = sys.excepthook
    sys.excepthook = lambda *error: plain(*error) if _in_main_thread() else None
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
