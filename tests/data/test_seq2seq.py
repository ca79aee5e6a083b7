"""The one entry to the data of encoder-decoders, and texts in several languages."""

import sys
import time

import numpy as np
import pytest

from tokred.data.byte_tasks import BYTE_TASKS
from tokred.data.languages import MRT5, MixedRows, open_languages
from tokred.data.packing import ChainedRows, PackedRows
from tokred.data.pipeline import train_batches
from tokred.data.seq2seq import open_seq2seq
from tokred.data.text import open_text
from tokred.data.tfds_text import split_of_language
from tokred.data.tokenizers import END, ByteTokenizer

BYTES = ByteTokenizer()


def first(data, index=0):
    return data.transform(data.source[index], np.random.default_rng(0))


def test_rows_of_a_corpus_fill_inputs_and_targets():
    pytest.importorskip("grain")
    data = open_seq2seq("stdlib", "valid", length=128)
    assert isinstance(data.source, PackedRows) and data.vocab == 259
    batch = next(train_batches(data.source, data.transform, batch=4, seed=0))
    assert batch["input"].shape == (4, 128) and batch["target"].shape == (4, 24)
    assert batch["input_valid"].all() and batch["weight"].all()
    assert (batch["input"] == 258).sum() == 4 and (batch["input"][:, -1] == END).all()


def test_options_reach_the_transform():
    own = {"first_sentinel": 259, "direction": 1, "mean_span": 3.0}
    data = open_seq2seq("stdlib", "valid", length=64, target_length=50, **own)
    example = first(data)
    assert data.vocab == 259 + 100 and example["target"].shape == (50,)
    assert np.isin(np.arange(259, 262), example["input"]).all()


def test_files_of_any_bytes(tmp_path):
    noise = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "noise.bin").write_bytes(noise)
    data = open_seq2seq(str(tmp_path / "noise.bin"), "train", length=64)
    assert first(data)["input_valid"].all()


@pytest.mark.parametrize("document", [b"", b"a", b"abc"])
def test_short_and_empty_documents(document, monkeypatch):
    monkeypatch.setattr("tokred.data.corpora.MockDocuments.__getitem__", lambda self, i: document)
    data = open_seq2seq("lm1b", "train", length=64, mock=3, packed=False)
    example = first(data)
    whole = np.concatenate([example["input"], example["target"]])
    assert BYTES.decode_bytes(whole[whole < 250]) in {document, document[::-1]}
    assert example["weight"][0] == 1


@pytest.mark.parametrize("task", BYTE_TASKS)
def test_tasks_by_the_same_entry(task):
    source, transform, vocab = open_seq2seq(task, "test", length=64, seed=3)
    example = transform(source[0], np.random.default_rng(0))
    assert example["input"].shape == (64,) and vocab == 259 and "seed=3" in repr(source)


def test_causal_is_that_of_open_text():
    data = open_seq2seq("stdlib", "valid", length=64, objective="causal", seed=2)
    text = open_text("stdlib", "valid", length=64, tokenizer=BYTES, seed=2)
    np.testing.assert_array_equal(first(data)["input"], first(text)["input"])


def test_languages_come_equally_often(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    data = open_seq2seq("mc4", "train", length=64, mock=4, languages=MRT5)
    assert isinstance(data.source, MixedRows) and len(data.source) == 60
    assert all(isinstance(rows, ChainedRows) for rows in data.source.sources)
    labels = [first(data, i)["language"] for i in range(60)]
    assert labels == [*range(15)] * 4 and labels[0].dtype == np.int32


def test_the_smaller_set_begins_anew():
    rows = MixedRows(tuple([{"token": n}] * size for n, size in enumerate((1, 3))))
    assert [rows[i]["token"] for i in range(len(rows))] == [0, 1, 0, 1, 0, 1]
    with pytest.raises(IndexError, match=r"^index must be in 0\.\.5, got 6: "):
        rows[6]
    with pytest.raises(ValueError, match=r"^sources must be at least one row long each, got \[0\]"):
        MixedRows(([],))


@pytest.fixture(scope="module")
def tfds():
    module = pytest.importorskip("tensorflow_datasets")
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    return module


@pytest.fixture(scope="module")
def stored(tfds, tmp_path_factory):
    """A folder with a set whose splits are languages, which TFDS itself wrote."""
    splits = ("en", "en-validation", "de", "de-validation")

    class TokredLanguages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for number in range(40):
                yield number, {"text": f"{split} {number}"}

    place = tmp_path_factory.mktemp("tfds")
    TokredLanguages(data_dir=place, file_format="array_record").download_and_prepare()
    return place


def test_splits_that_are_languages_are_read(stored, monkeypatch):
    monkeypatch.setattr("tokred.data.languages.MC4", "tokred_languages")
    english, german = open_languages("mc4", "train", ("en", "de"), data_dir=stored)
    assert {english[i] for i in range(len(english))} <= {b"en %d" % i for i in range(40)}
    assert (len(english), len(german), english.name) == (38, 38, "tokred_languages/en")
    [valid] = open_languages("mc4", "valid", ("de",), data_dir=stored)
    assert {valid[i] for i in range(40)} == {b"de-validation %d" % i for i in range(40)}
    data = open_seq2seq("mc4", "test", length=32, languages=("en", "de"), data_dir=stored)
    assert [first(data, i)["language"] for i in range(2)] == [0, 1]
    with pytest.raises(ValueError, match=r"^languages must be among \['de', 'en'\], got 'xx': "):
        open_languages("mc4", "train", ("en", "xx"), data_dir=stored)


def test_splits_of_languages():
    stored = ["de", "de-validation", "fr"]
    chosen = [split_of_language(split, stored, "de") for split in ("train", "valid", "test")]
    assert chosen == ["de[:95%]", "de-validation", "de[95%:100%]"]
    assert split_of_language("valid", stored, "fr") == "fr[90%:95%]"


@pytest.mark.parametrize("name, told", [("mc4", "c4/multilingual"), ("wiki40b", "wiki40b/en")])
def test_unprepared_languages_fail_fast_and_say_what_to_run(name, told, tfds, tmp_path):
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=rf"^{told} is not prepared in .*: run `pip") as e:
        open_seq2seq(name, "train", length=64, languages=("en", "de"), data_dir=tmp_path)
    assert time.perf_counter() - start < 10  # far below a second where nothing else runs
    assert f"tfds.builder('{told}'" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("stdlib", {"objective": "prefix"}, r"^objective must be one of \('spans', 'causal'\), "),
        ("stdlib", {"objective": "causal", "target_length": 9}, r"^target_length must be None "),
        ("merge_abc", {"languages": ("en",)}, r"^languages must be none for the task 'merge_abc'"),
        ("mc4", {}, r"^languages must be given for 'mc4', such as \('en', 'de'\), got \(\): "),
        ("mc4", {"languages": ("en", "en")}, r"^languages must be one or more names, all differ"),
        ("stdlib", {"target_length": 5}, r"^target_length must be at least 13 for inputs of "),
        ("stdlib", {"split": "validation"}, r"^split must be one of .*, got 'validation': "),
    ],
)
def test_bad_values(name, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_seq2seq(name, **{"split": "train", "length": 64, **options})
    assert "\n" not in str(caught.value)


def test_bad_names_and_options(tfds):
    with pytest.raises(TypeError, match=r"^options of span corruption must be among .*\['rate'\]"):
        open_seq2seq("stdlib", "train", length=64, rate=0.1)
    with pytest.raises(ValueError, match=r"did you mean 'spelling_correction'\?$"):
        open_seq2seq("spelling_corection", "train", length=64)
