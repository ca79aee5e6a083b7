"""Corpora by name, their splits and errors, and the one entry to all language data."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokred.data.corpora import (
    SPLITS,
    MockDocuments,
    cut_document,
    load_files,
    load_stdlib,
    open_corpus,
    split_of,
)
from tokred.data.diagnostics import DIAGNOSTICS
from tokred.data.packing import ChainedRows, DocumentRows, PackedRows
from tokred.data.pipeline import train_batches
from tokred.data.text import open_text
from tokred.data.tfds_text import stored_split
from tokred.data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
STORED = 40  # documents in each split of the set on disk


@pytest.fixture
def folder(tmp_path):
    """200 files in two folders, a hidden and an empty one."""
    (tmp_path / "sub").mkdir()
    for number in range(200):
        place = tmp_path / "sub" if number % 2 else tmp_path
        (place / f"{number}.txt").write_bytes(b"document %d \xff" % number)
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def open_all(name, **options):
    return [open_corpus(name, split, **options) for split in SPLITS]


def test_stdlib_is_split_without_overlap_and_complete():
    corpora = open_all("stdlib")
    documents = [text for corpus in corpora for text in corpus.documents]
    assert sorted(documents) == sorted(text for _, text in load_stdlib())
    assert 0.8 < len(corpora[0]) / len(documents) < 0.97 and min(map(len, corpora)) > 5
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert re.fullmatch(r"[0-9a-f]{16}", corpora[0].fingerprint)
    names = [name for name, _ in load_stdlib()]
    assert names == sorted(names) and {"ast.py", "json/decoder.py"} <= set(names)
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    assert not any(left_out & set(name.split("/")) for name in names)


def test_splits_have_their_shares():
    counts = np.unique([split_of(str(i)) for i in range(20_000)], return_counts=True)
    shares = dict(zip(counts[0].tolist(), counts[1] / 20_000, strict=True))
    assert shares == pytest.approx({"train": 0.9, "valid": 0.05, "test": 0.05}, abs=0.005)


@pytest.mark.parametrize("pattern", ["{}", "file:{}", "{}/**/*.txt"])
def test_folders_and_globs_have_a_document_per_file(folder, pattern):
    corpora = open_all(pattern.format(folder))
    found = sorted(text for corpus in corpora for text in corpus.documents)
    assert found == sorted(b"document %d \xff" % i for i in range(200))
    assert [corpus.split for corpus in corpora] == list(SPLITS)


def test_a_document_keeps_its_split_and_the_fingerprint_tells_data_apart(folder):
    before = open_corpus(str(folder), "train")
    again = open_corpus(f"{folder}/**/*.txt", "train")
    assert again.fingerprint == before.fingerprint and again.documents == before.documents
    (folder / "more.txt").write_text("more")
    after = open_corpus(str(folder), "train")
    assert set(before.documents) <= set(after.documents)
    assert after.fingerprint != before.fingerprint


def test_one_file_is_cut_at_blank_lines(tmp_path):
    rng = np.random.default_rng(0)
    paragraphs = ["x" * n for n in rng.integers(100, 2000, 1500)]
    text = "\n\n".join(paragraphs).encode()
    (tmp_path / "long.txt").write_bytes(text)
    documents = load_files(str(tmp_path / "long.txt"))
    assert b"".join(piece for _, piece in documents) == text
    assert all(piece.endswith(b"\n\n") for _, piece in documents[:-1])
    assert all(6000 < len(piece) <= 10_240 for _, piece in documents[:-1])
    assert sum(map(len, open_all(f"file:{tmp_path}/long.txt"))) == len(documents)


@given(st.text("ab \n\r", max_size=300), st.integers(4, 40))
def test_cutting_loses_nothing(text, size):
    pieces = cut_document(text.encode(), size)
    assert b"".join(pieces) == text.encode()
    assert all(0 < len(piece) <= size * 5 // 4 + 3 for piece in pieces)


def test_mock_documents_are_fixed_by_split_and_index():
    corpus = open_corpus("lm1b", "train", mock=5)
    assert len(corpus) == 5 and all(20 < len(text) < 4000 for text in corpus.documents)
    assert corpus[3] == open_corpus("lm1b", "train", mock=5)[3] != corpus[2]
    assert corpus[3] != open_corpus("lm1b", "test", mock=5)[3]
    with pytest.raises(IndexError, match=r"^index must be in 0\.\.4, got 5: "):
        corpus[5]
    with pytest.raises(ValueError, match=r"^mock must be at least 1 document, got -1: "):
        MockDocuments("train", -1)


def test_reprs_are_stable(folder):
    for name in ("stdlib", str(folder)):
        one, other = (open_corpus(name, "train") for _ in range(2))
        assert repr(one) == repr(other) and "0x" not in repr(one) and len(repr(one)) < 300


@pytest.mark.parametrize("name", ["/no/such/file", "file:none.txt", "/no/*.txt", "~/no/such/file"])
def test_missing_files(name):
    with pytest.raises(FileNotFoundError, match=r"^name must be an existing file, directory or "):
        open_corpus(name, "train")


def test_splits_without_documents(tmp_path):
    (tmp_path / "one.txt").write_text("one")
    lacking = next(split for split in SPLITS if split != split_of("one.txt"))
    with pytest.raises(ValueError, match=r"^split must have at least one document, got none of "):
        open_corpus(str(tmp_path), lacking)
    with pytest.raises(ValueError, match=r"^split must be one of .*, got 'validation': "):
        open_corpus("stdlib", "validation")


@pytest.fixture(scope="module")
def tfds():
    module = pytest.importorskip("tensorflow_datasets")
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    return module


@pytest.fixture(scope="module")
def stored(tfds, tmp_path_factory):
    """A folder with a text set that TFDS itself wrote, without a validation split."""

    class TokredStories(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"title": tfds.features.Text(), "text": tfds.features.Text()}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", "test")}

        def _generate_examples(self, split):
            for number in range(STORED):
                yield number, {"title": "no", "text": f"{split} {number}"}

    place = tmp_path_factory.mktemp("tfds")
    TokredStories(data_dir=place, file_format="array_record").download_and_prepare()
    return place


def test_prepared_sets_are_read(stored):
    train, valid, test = open_all("tokred_stories", data_dir=stored)
    assert (len(train), len(valid), len(test)) == (STORED - 2, 2, STORED)
    texts = {train[i] for i in range(len(train))} | {valid[i] for i in range(len(valid))}
    assert texts == {b"train %d" % i for i in range(STORED)}
    assert {test[i] for i in range(STORED)} == {b"test %d" % i for i in range(STORED)}
    assert not train.in_memory and train.fingerprint == test.fingerprint
    text = open_text("tokred_stories", "train", length=32, tokenizer=BYTES, data_dir=stored)
    assert isinstance(text.source, ChainedRows) and "0x" not in repr(text.source)
    batch = next(train_batches(text.source, text.transform, batch=4, seed=0))
    assert BYTES.decode(batch["input"][0]).startswith("train ")


def test_another_format_on_disk_is_told_apart(stored, tmp_path):
    import shutil

    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    [info] = tmp_path.rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(FileNotFoundError, match=r"in another format .*data_dir='ANOTHER_FOLDER'"):
        open_corpus("tokred_stories", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    "stored, expected",
    [
        ("train validation test", "train validation test"),
        ("train test", "train[:95%] train[95%:100%] test"),
        ("train validation", "train[:95%] validation train[95%:100%]"),
        ("train", "train[:90%] train[90%:95%] train[95%:100%]"),
    ],
)
def test_splits_that_a_set_lacks_are_cut_from_train(stored, expected):
    assert [stored_split(split, stored.split()) for split in SPLITS] == expected.split()


@pytest.mark.parametrize(
    "name", ["lm1b", "pg19", "wiki40b/en", "c4/en", "scientific_papers/arxiv", "tiny_shakespeare"]
)
def test_unprepared_sets_fail_fast_and_say_what_to_run(name, tfds, tmp_path):
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as caught:
        open_corpus(name, "train", data_dir=tmp_path)
    assert time.perf_counter() - start < 10  # half a second; a download that is tried takes minutes
    message = str(caught.value)
    assert message.startswith(f"{name} is not prepared in {tmp_path}: ") and "\n" not in message
    command = f"tfds.builder('{name}', file_format='array_record', data_dir='{tmp_path}')"
    assert f"{command}.download_and_prepare()" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, message",
    [
        ("lm1bb", r"got 'lm1bb': did you mean 'lm1b'\?$"),
        ("stdlb", r"got 'stdlb': did you mean 'stdlib'\?$"),
        ("huggingface:c4", r"^name must be one of \['stdlib'\], an existing path or a text set"),
        ("No such set", r"did you mean '\w+'\?$"),
        ("mnist", r"^name must be a set with one text feature, got 'mnist' with \[\] among "),
        ("mlqa/en", r"got 'mlqa/en' with \['title', 'context', 'question'\] among its features"),
        ("lm1b/none", r"^name must be a set, config and version that TFDS has, got 'lm1b/none' \("),
        (
            "lm1b:9.9.9",
            r"^name must be a set, config and version that TFDS has, .*: change name\.$",
        ),
    ],
)
def test_bad_names(name, message, tfds, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        open_corpus(name, "train", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packed, kind", [(True, PackedRows), (False, DocumentRows)])
def test_rows_of_a_corpus(packed, kind):
    pytest.importorskip("grain")
    text = open_text("stdlib", "valid", length=64, tokenizer=BYTES, packed=packed)
    source, transform, vocab = text
    assert isinstance(source, kind) and vocab == 259
    batch = next(train_batches(source, transform, batch=4, seed=0))
    assert batch["input"].shape == (4, 64) and batch["input"].max() < vocab
    assert "id" in batch and batch["weight"].mean() > 0.5


@pytest.mark.parametrize("packed", [True, False])
def test_mock_rows_need_no_tfds(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    options = {"length": 4096, "tokenizer": BYTES, "packed": packed, "mock": 6}
    text = open_text("c4/en", "train", **options)
    assert len(text.source) == 6
    example = text.transform(text.source[5], np.random.default_rng(0))
    assert example["input"].shape == (4096,)
    assert (example["document"] == -1).any() == (not packed)


@pytest.mark.parametrize("task", DIAGNOSTICS)
def test_diagnostics_by_the_same_entry(task):
    source, transform, vocab = open_text(task, "test", length=64, vocab=70, seed=3)
    example = transform(source[0], np.random.default_rng(0))
    assert example["input"].shape == (64,) and example["input"].max() < vocab == 70
    assert "seed=3" in repr(source)


def test_bad_calls():
    with pytest.raises(TypeError, match=r"^tokenizer must be given for the corpus 'stdlib', got "):
        open_text("stdlib", "train", length=8)
    with pytest.raises(TypeError, match=r"^options must be none for the corpus 'stdlib', got \['p"):
        open_text("stdlib", "train", length=8, tokenizer=BYTES, pairs=3)
    with pytest.raises(ValueError, match=r"^length must be at least 1 token, got 0: "):
        open_text("stdlib", "train", length=0, tokenizer=BYTES)


def test_misspelt_diagnostics_get_the_nearest(tfds):
    with pytest.raises(ValueError, match=r"got 'needles': did you mean 'needle'\?$"):
        open_text("needles", "train", length=8, tokenizer=BYTES)


FRESH = """
import sys
from tokred.data import text, tokenizers
assert not {'tensorflow', 'tensorflow_datasets', 'grain', 'tokenizers'} & set(sys.modules)
text.open_text('stdlib', 'test', length=8, tokenizer=tokenizers.ByteTokenizer())
text.open_text('copy', 'test', length=8)
assert not {'tensorflow', 'tensorflow_datasets', 'grain', 'tokenizers'} & set(sys.modules)
"""


def test_a_fresh_process_imports_lazily():
    subprocess.run([sys.executable, "-c", FRESH], check=True)
