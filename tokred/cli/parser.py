"""What the commands share: errors of one sentence, types of arguments, names in a list."""

import argparse
from typing import NoReturn

ROUND_TO = "raise counts of tokens to multiples of it, such as a tile edge of the hardware"


class Parser(argparse.ArgumentParser):
    """Ends in one sentence and exit code 2 where arguments do not fit."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def names(text: str) -> list[str]:
    """['a', 'b'] of 'a, b'."""
    return [name.strip() for name in text.split(",")]
