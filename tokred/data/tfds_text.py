"""Text sets read through TFDS as random-access array_record: no TensorFlow, no download."""

import difflib
import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from tokred.data.prepared import how_to_prepare

NAME = re.compile(r"[a-z][a-z0-9_]*(/[\w.\-]+)?(:\d+\.\d+\.\d+)?")
BEAM = ("c4", "wiki40b", "wikipedia")  # not listed by TFDS where TensorFlow is not installed
STORED = {"train": "train", "valid": "validation", "test": "test"}
SHARE = 5  # percent of train that stand in for a split which a set lacks


@dataclass(frozen=True, eq=False)
class Records(Sequence[bytes]):
    """The texts of a TFDS data source, each read when it is asked for."""

    source: Any
    feature: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.source[index][self.feature]


def open_text_set(
    name: str,
    split: str,
    data_dir: str | PathLike | None = None,
    *,
    language: str = "",
    others: Sequence[str] = (),
) -> tuple[Records, str]:
    """The texts of one split of a prepared set, and its fingerprint (name, version, sizes).

    name: 'name' or 'name/config', also with ':version'. split: 'train', 'valid' or 'test'; see
    stored_split for sets that lack one. language: of a set whose splits are languages, such as
    c4/multilingual. others: further names to propose for a misspelt one.
    Raises ValueError for an unknown name or a set without text, FileNotFoundError for a set that
    is not prepared on this machine.
    """
    builder = _find_builder(name, data_dir, others)
    feature = find_text_feature(name, builder.info)
    if not builder.info.splits:
        raise FileNotFoundError(_how_to_prepare(name, data_dir))
    stored = builder.info.splits
    chosen = split_of_language(split, stored, language) if language else stored_split(split, stored)
    try:
        source = builder.as_data_source(split=chosen)
    except NotImplementedError:
        raise FileNotFoundError(_how_to_prepare(name, data_dir, in_other_format=True)) from None
    return Records(source, feature), _fingerprint(builder.info)


def _find_builder(name: str, data_dir: str | PathLike | None, others: Sequence[str]) -> Any:
    """TFDS's builder; it reads files at most, as long as the name has no namespace."""
    import tensorflow_datasets as tfds

    if NAME.fullmatch(name):
        try:
            return tfds.builder(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError:
            if re.split("[/:]", name)[0] in BEAM:
                raise FileNotFoundError(_how_to_prepare(name, data_dir)) from None
        except (ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0].split('}": ')[-1].split(". ")[0].rstrip(".")
            raise ValueError(
                f"name must be a set, config and version that TFDS has, got {name!r} ({reason}): "
                "change name."
            ) from error
    known = sorted({*tfds.list_builders(with_community_datasets=False), *BEAM, *others})
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"name must be one of {sorted(others)}, an existing path or a text set of TFDS, "
        f"got {name!r}: did you mean {nearest!r}?"
    )


def find_text_feature(name: str, info: Any) -> str:
    """The feature that holds the text: 'text', or the only Text, or the input of supervision.

    Raises ValueError where this does not name one.
    """
    from tensorflow_datasets.core.features import Text

    features = dict(info.features) if hasattr(info.features, "items") else {}
    texts = [key for key, feature in features.items() if isinstance(feature, Text)]
    supervised = info.supervised_keys[:1] if info.supervised_keys else ()
    for candidates in (("text",), texts if len(texts) == 1 else (), supervised):
        for key in candidates:
            if key in texts:
                return key
    raise ValueError(
        f"name must be a set with one text feature, got {name!r} with {texts} among its features "
        f"{sorted(features)}: change name."
    )


def stored_split(split: str, stored: Collection[str]) -> str:
    """What TFDS calls the split 'train', 'valid' or 'test' of a set that stores these splits.

    Each of validation and test that the set lacks is cut, 5 percent long, from the end of train,
    and is then no part of train.
    """
    lacking = [key for key in ("valid", "test") if STORED[key] not in stored]
    if split in lacking:
        start = 100 - SHARE * (len(lacking) - lacking.index(split))
        return f"train[{start}%:{start + SHARE}%]"
    if split == "train" and lacking:
        return f"train[:{100 - SHARE * len(lacking)}%]"
    return STORED[split]


def split_of_language(split: str, stored: Collection[str], language: str) -> str:
    """The same of a set that stores 'en' to train on and 'en-validation', for each language.

    Raises ValueError for a language that it lacks.
    """
    valid = f"{language}-validation"
    if language not in stored:
        known = sorted(key for key in stored if not key.endswith("-validation"))
        raise ValueError(f"languages must be among {known}, got {language!r}: change languages.")
    own = {"train", "validation"} if valid in stored else {"train"}
    return stored_split(split, own).replace("validation", valid).replace("train", language)


def _fingerprint(info: Any) -> str:
    sizes = sorted((key, split.num_examples) for key, split in info.splits.items())
    return hashlib.sha256(repr((info.full_name, sizes)).encode()).hexdigest()[:16]


def _how_to_prepare(
    name: str, data_dir: str | PathLike | None, *, in_other_format: bool = False
) -> str:
    from tensorflow_datasets.core import constants

    folder = str(constants.DATA_DIR if data_dir is None else data_dir)
    beam = " apache-beam" if re.split("[/:]", name)[0] in BEAM else ""
    return how_to_prepare(name, folder, in_other_format=in_other_format, packages=beam)
