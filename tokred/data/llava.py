"""Conversations about images in a JSON file, as LLaVA's data are stored, beside a folder of images.

    [{"id": "7", "image": "cats/7.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nHow many cats are there?"},
                        {"from": "gpt", "value": "Two."}]}, ...]

"image" is a path in the folder, a list of them, or absent; human and gpt take turns. All entries
are checked when the file is opened, pixels when they are read.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tokred.data.conversations import ConversationFormat, Example, Turn, encode_turns
from tokred.data.corpora import SPLITS, split_of
from tokred.data.pairs import expect

MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels
TOO_LONG = ("raise", "drop")
ROLES = ("human", "gpt")


@dataclass(frozen=True)
class Entry:
    """One entry of the file. index: its place there. key: its split's. images: in the folder."""

    index: int
    key: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True, eq=False)
class LlavaSource:
    """Random access to raw examples for ConversationTransform; made by open_llava.

    channels: 1 or 3. dropped: how many entries were too long.
    """

    path: str
    folder: str
    split: str
    entries: Sequence[Entry] = field(repr=False)
    channels: int = 3
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        """'name' str, 'images' of uint8 [H, W, C], 'choices' of one conversation.

        Raises IndexError outside 0..len - 1, ValueError for a file that is no image.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}: change index.")
        entry = self.entries[index]
        name = _name(entry.index, self.path)
        images = tuple(self._read(path, name) for path in entry.images)
        return {"name": name, "images": images, "choices": (entry.turns,)}

    def _read(self, path: str, name: str) -> UInt8[np.ndarray, "H W C"]:
        place = Path(self.folder, path)
        try:
            with Image.open(place) as picture:
                pixels = np.array(picture.convert(MODES[self.channels]))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ValueError(
                f"{name}: image must be a readable image file, got {str(place)!r} ({reason}): "
                "replace the file or remove the entry."
            ) from None
        return pixels.reshape(*pixels.shape[:2], self.channels)


def open_llava(
    path: str | PathLike,
    form: ConversationFormat,
    *,
    split: str = "all",
    folder: str | PathLike | None = None,
    channels: int = 3,
    too_long: str = "raise",
) -> LlavaSource:
    """The entries of a JSON file that are in a split.

    split: 'all', or 'train', 'valid' or 'test': 90, 5 and 5 percent, by a hash of the first image's
    path (of the id where there is none), so that an image stays in its split. folder: of the
    images, the file's own if None. channels: 1 or 3. too_long: 'raise', or 'drop' the entries that
    are longer than form.length, with one warning that counts them.

    Raises:
      ValueError: a file that is no such JSON, or, by its index, an entry that is malformed, too
        long, or has another number of images than its prompts have '<image>'; no entry at all.
      FileNotFoundError: no such JSON file, or no such image.
    """
    expect(channels in MODES, "channels", f"one of {tuple(MODES)}", channels)
    expect(too_long in TOO_LONG, "too_long", f"one of {TOO_LONG}", too_long)
    expect(split in ("all", *SPLITS), "split", f"one of {('all', *SPLITS)}", split)
    place = str(Path(path).expanduser())
    folder = str(Path(place).parent if folder is None else Path(folder).expanduser())
    parsed = [_parse(item, index, place) for index, item in enumerate(_load(place))]
    entries = [entry for entry in parsed if split in ("all", split_of(entry.key))]
    _find_images(entries, place, folder)
    fitting = [entry for entry in entries if _fits(entry, place, form, too_long)]
    if not fitting:
        raise ValueError(
            f"{place!r} must have an entry in split {split!r} that fits length={form.length}, got "
            f"none of {len(parsed)}: change the file, split or length."
        )
    dropped = len(entries) - len(fitting)
    if dropped:
        warnings.warn(
            f"{place!r} has {dropped} of {len(entries)} entries in split {split!r} that are longer "
            f"than length={form.length} tokens: they are dropped.",
            stacklevel=2,
        )
    return LlavaSource(place, folder, split, tuple(fitting), channels, dropped)


def _load(path: str) -> list[Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"path must be an existing JSON file, got {path!r}: change the path."
        )
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path must be a JSON file, got {path!r} ({error}): mend it.") from None
    if not isinstance(loaded, list):
        raise ValueError(
            f"path must be a JSON list of entries, got {type(loaded).__name__} in {path!r}: "
            "put the entries into a list."
        )
    return loaded


def _name(index: int, path: str) -> str:
    return f"entry {index} of {path!r}"


def _parse(item: Any, index: int, path: str) -> Entry:
    name = _name(index, path)
    turns = item.get("conversations") if isinstance(item, dict) else None
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise ValueError(
            f"{name} must be an object with 'conversations', a list of pairs of what human and gpt "
            "say, got something else: mend the entry."
        )
    said = [_parse_turn(turn, ROLES[i % 2], i, name) for i, turn in enumerate(turns)]
    images = _paths(item, name)
    key = str(item.get("id", index)) if not images else images[0]
    return Entry(index, key, images, tuple(zip(said[::2], said[1::2], strict=True)))


def _parse_turn(turn: Any, role: str, number: int, name: str) -> str:
    right = isinstance(turn, dict) and turn.get("from") == role
    if not right or not isinstance(turn.get("value"), str):
        raise ValueError(
            f"{name} must have {{'from': {role!r}, 'value': text}} in place {number} of "
            f"'conversations', got {str(turn)[:80]!r}: mend the entry."
        )
    return turn["value"]


def _paths(item: dict[str, Any], name: str) -> tuple[str, ...]:
    given = item.get("image")
    paths = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(
            f"{name} must have a path or a list of paths as 'image', got {str(given)[:80]!r}: "
            "mend the entry."
        )
    return tuple(paths)


def _find_images(entries: Sequence[Entry], path: str, folder: str) -> None:
    first = {image: entry.index for entry in reversed(entries) for image in entry.images}
    for image, index in first.items():
        if not Path(folder, image).is_file():
            raise FileNotFoundError(
                f"{_name(index, path)}: image must be an existing file, got "
                f"{str(Path(folder, image))!r}: add the file or change folder={folder!r}."
            )


def _fits(entry: Entry, path: str, form: ConversationFormat, too_long: str) -> bool:
    """Raises ValueError for an entry that is wrong, or too long without leave to drop it."""
    try:
        tokens = encode_turns(entry.turns, len(entry.images), form).tokens
        fits = tokens <= form.length
        if too_long == "raise":
            expect(fits, "length", f"at least {tokens} for this example", form.length)
    except ValueError as error:
        raise ValueError(f"{_name(entry.index, path)}: {error}") from None
    return fits
