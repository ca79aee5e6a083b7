"""Examples of an encoder-decoder: two rows of ids, each padded at its end.

    input int32 [N]             what the encoder reads, ended by the end token
    input_valid bool [N]        false at padding
    decoder_input int32 [M]     the target behind the start token, without its last token
    target int32 [M]            what the decoder writes, ended by the end token
    weight float32 [M]          0 at padding

N and M are static. Padding and the start token have the id PAD, as in T5.
"""

from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from tokred.data.tokenizers import END, PAD

Example = dict[str, Any]


def make_pair(
    source: Int[np.ndarray, " n"], target: Int[np.ndarray, " m"], *, length: int, target_length: int
) -> Example:
    """The example of two rows that have no end tokens yet; N = length, M = target_length.

    Raises ValueError where a row with its end token is longer than that: nothing is ever cut.
    """
    padded = _end(target, target_length, "target_length")
    return {
        "input": _end(source, length, "length"),
        "input_valid": np.arange(length) <= len(source),
        "decoder_input": shift_right(padded),
        "target": padded,
        "weight": (np.arange(target_length) <= len(target)).astype(np.float32),
    }


def shift_right(target: Int[np.ndarray, "*B M"], start: int = PAD) -> Int[np.ndarray, "*B M"]:
    """What the decoder reads to write the target: the start token and all but the last token."""
    first = np.full_like(target[..., :1], start)
    return np.concatenate([first, target[..., :-1]], -1)


def expect(holds: bool, name: str, wanted: str, got: object) -> None:
    """Raises ValueError, one sentence that names the field, unless it holds."""
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {got!r}: change {name}.")


def _end(ids: np.ndarray, length: int, name: str) -> Int32[np.ndarray, " N"]:
    expect(len(ids) < length, name, f"at least {len(ids) + 1} for this example", length)
    return np.pad(np.append(ids, END).astype(np.int32), (0, length - len(ids) - 1))
