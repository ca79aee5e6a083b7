"""Image-text sets that TFDS has prepared on this machine: no TensorFlow, no download.

A set is read from its files, so any will do that has an image and a text, also one that this
version of TFDS cannot build, such as coco_captions where TensorFlow is not installed.

`MockPairs` makes pairs up instead, for tests and for speed; it needs no TFDS.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from tokred.data.conversations import IMAGE, Example, Turn
from tokred.data.corpora import SPLITS, WORDS
from tokred.data.pairs import expect
from tokred.data.prepared import how_to_prepare
from tokred.data.tfds_text import NAME, stored_split

ASK = "Describe the image."
USUAL = ("caption", "captions", "text")  # features that hold the text, if there are several texts
SHORT = {"val": "validation"}  # what some sets call a split


@dataclass(frozen=True, eq=False)
class PairRecords:
    """Random access to raw examples for ConversationTransform; made by open_tfds_pairs.

    text, question: features, those of a sequence as 'captions/text'; no question: `ask` is asked.
    """

    name: str
    split: str
    source: Any
    image: str
    text: str
    question: str | None = None
    ask: str = ASK

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """'name' str, 'images' of one uint8 [H, W, C], 'choices': a conversation for each text.

        Raises ValueError for an example without text, or with another number of questions.
        """
        record, name = self.source[index], f"example {index} of {self.name} ({self.split})"
        answers = _read_texts(record, self.text)
        asked = [self.ask] * len(answers)
        if self.question is not None:
            asked = _read_texts(record, self.question)
        if not answers or len(asked) != len(answers):
            raise ValueError(
                f"{name} must have a text or more in {self.text!r} and as many questions, got "
                f"{len(answers)} and {len(asked)}: change text or question."
            )
        choices = tuple((_turn(*turn),) for turn in zip(asked, answers, strict=True))
        return {"name": name, "images": (record[self.image],), "choices": choices}


def _turn(question: str, answer: str) -> Turn:
    return f"{IMAGE}\n{question}", answer


def _read_texts(record: Example, feature: str) -> list[str]:
    if feature in record:
        found = record[feature]
    else:
        outer, _, inner = feature.rpartition("/")
        found = record[outer][inner]
    texts = [found] if isinstance(found, (bytes, str)) else list(found)
    return [t.decode("utf-8", errors="replace") if isinstance(t, bytes) else t for t in texts]


@dataclass(frozen=True)
class MockPairs:
    """`count` made-up pairs: uniform noise and five captions of words, fixed by split and index.

    channels: of the images. Raises ValueError for a count below 1 or an unknown split.
    """

    count: int
    split: str = "train"
    channels: int = 3

    def __post_init__(self):
        expect(self.count >= 1, "mock", "at least 1 example", self.count)
        expect(self.split in SPLITS, "split", f"one of {SPLITS}", self.split)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        """As of PairRecords; IndexError outside 0..count - 1."""
        if not 0 <= index < self.count:
            raise IndexError(f"index must be in 0..{self.count - 1}, got {index}: change index.")
        rng = np.random.default_rng((SPLITS.index(self.split), index))
        size = (*rng.integers(24, 65, 2).tolist(), self.channels)
        captions = (" ".join(rng.choice(WORDS.split(), rng.integers(1, 6))) for _ in range(5))
        return {
            "name": f"example {index} of mock data ({self.split})",
            "images": (rng.integers(0, 256, size, dtype=np.uint8),),
            "choices": tuple((_turn(ASK, caption),) for caption in captions),
        }


def open_tfds_pairs(
    name: str,
    split: str,
    *,
    data_dir: str | PathLike | None = None,
    text: str | None = None,
    question: str | None = None,
    ask: str = ASK,
    others: Sequence[str] = (),
) -> PairRecords:
    """The pairs of one split of a prepared set.

    name: 'name' or 'name/config', also with ':version'. split: 'train', 'valid' or 'test'; see
    stored_split for sets that lack one. data_dir: where TFDS keeps its sets, its own default if
    None. text: the feature with the answers, such as 'captions/text'; None: the only text of the
    set, or its only caption or text. question: the feature with as many questions; None: `ask` is
    asked. others: further names to propose for a misspelt one.

    Raises:
      ValueError: an unknown name, split or feature, a set without an image or a text, or with
        several.
      FileNotFoundError: a set that is not prepared on this machine.
    """
    expect(split in SPLITS, "split", f"one of {SPLITS}", split)
    builder = _find_prepared(name, data_dir, others)
    features = builder.info.features
    image, text = find_image(name, features), find_text(name, features, text, question)
    try:
        source = builder.as_data_source(split=_stored_split(split, list(builder.info.splits)))
    except NotImplementedError:
        raise FileNotFoundError(_how_to_prepare(name, data_dir, in_other_format=True)) from None
    return PairRecords(name, split, source, image, text, question, ask)


def _find_prepared(name: str, data_dir: str | PathLike | None, others: Sequence[str]) -> Any:
    """TFDS's builder of a set on disk; without a namespace in its name it reads files alone."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    if NAME.fullmatch(name):
        try:
            return read_only_builder.builder_from_files(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError:
            pass
    known = sorted({*tfds.list_builders(with_community_datasets=False), *others})
    if NAME.fullmatch(name) and re.split("[/:]", name)[0] in known:
        raise FileNotFoundError(_how_to_prepare(name, data_dir))
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"name must be one of {sorted(others)}, a JSON file or a set of TFDS, got {name!r}: "
        f"did you mean {nearest!r}?"
    )


def find_image(name: str, features: Any) -> str:
    """The feature that holds the image: 'image', or the only one; ValueError otherwise."""
    from tensorflow_datasets.core.features import Image

    images = [key for key, feature in features.items() if isinstance(feature, Image)]
    chosen = ["image"] if "image" in images else images
    expect(len(chosen) == 1, "name", f"a set with one image, among {images}", name)
    return chosen[0]


def find_text(name: str, features: Any, text: str | None, question: str | None) -> str:
    """The feature with the answers; ValueError for features that are no texts, or without one."""
    texts = list(_list_texts(features))
    for field, given in (("text", text), ("question", question)):
        expect(given in (None, *texts), field, f"one of the texts {texts} of {name}", given)
    if text is not None:
        return text
    others = [key for key in texts if key != question]
    usual = [key for key in others if key.split("/")[0] in USUAL]
    chosen = usual if len(usual) == 1 else others
    expect(len(chosen) == 1, "text", f"one of the texts {texts} of {name}", text)
    return chosen[0]


def _list_texts(features: Any) -> Iterator[str]:
    """Texts, and those in sequences, which may hold several features each."""
    for key, feature in features.items():
        item = getattr(feature, "feature", feature)
        if hasattr(item, "items"):
            yield from (f"{key}/{part}" for part, leaf in item.items() if _is_text(leaf))
        elif _is_text(item):
            yield key


def _is_text(feature: Any) -> bool:
    return feature.shape == () and np.dtype(feature.np_dtype).kind == "O"


def _stored_split(split: str, stored: Sequence[str]) -> str:
    own = {SHORT.get(key, key): key for key in stored}
    chosen = stored_split(split, own)
    base, _, _ = chosen.partition("[")
    expect(base in own, "split", f"one that is made from those of the set, {stored}", split)
    return chosen.replace(base, own[base])


def _how_to_prepare(
    name: str, data_dir: str | PathLike | None, *, in_other_format: bool = False
) -> str:
    from tensorflow_datasets.core import constants

    folder = str(constants.DATA_DIR if data_dir is None else data_dir)
    return how_to_prepare(name, folder, in_other_format=in_other_format)
