"""Image-text sets: one shaped like coco_captions on disk, made-up pairs, and what is not there."""

import io
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tokred.data.conversations import BYTES
from tokred.data.tfds_pairs import MockPairs, open_tfds_pairs
from tokred.data.vision_language import open_conversations

SIZES = {"length": 96, "image_size": (4, 6)}
STORED = 4  # examples of each split on disk


def read(ids):
    return BYTES.decode(np.where(ids == 259, 3 + ord("#"), ids))


@pytest.fixture(scope="module")
def tfds():
    module = pytest.importorskip("tensorflow_datasets")
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    return module


def encode(split, number):
    file = io.BytesIO()
    Image.new("RGB", (5 + number, 6), (number, 0, len(split))).save(file, "PNG")
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def stored(tfds, tmp_path_factory):
    """A folder with a set that TFDS itself wrote, and a second one whose name it does not know."""

    class TokredPairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.1.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "image/filename": tfds.features.Text(),
                "captions": tfds.features.Sequence({"id": np.int64, "text": np.str_}),
                "qa": tfds.features.Sequence({"question": np.str_, "answer": np.str_}),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", "val", "test")}

        def _generate_examples(self, split):
            for number in range(STORED):
                yield (
                    number,
                    {
                        "image": encode(split, number),
                        "image/filename": f"{number}.png",
                        "captions": [
                            {"id": i, "text": f"{split} {number} {i}"} for i in range(number)
                        ],
                        "qa": [{"question": f"{i}?", "answer": f"{number}{i}"} for i in range(2)],
                    },
                )

    place = tmp_path_factory.mktemp("tfds")
    TokredPairs(data_dir=place, file_format="array_record").download_and_prepare()
    shutil.copytree(place / "tokred_pairs", place / "unheard_of")
    for path in (place / "unheard_of").rglob("*tokred_pairs*"):
        path.rename(path.with_name(path.name.replace("tokred_pairs", "unheard_of")))
    for path in (place / "unheard_of").rglob("*.json"):
        path.write_text(path.read_text().replace("tokred_pairs", "unheard_of"))
    return place


def find(name, split, stored, captions):
    """The place of the example with so many captions."""
    records = open_tfds_pairs(name, split, data_dir=stored).source
    return [len(record["captions"]["text"]) for record in records].index(captions)


@pytest.mark.parametrize("name", ["tokred_pairs", "unheard_of", "tokred_pairs:1.1.0"])
def test_prepared_sets_are_read_from_their_files(name, stored):
    data = open_conversations(name, "train", data_dir=stored, mean=(0,) * 3, std=(1,) * 3, **SIZES)
    assert len(data.source) == STORED and "0x" not in repr(data.source)
    index = find(name, "train", stored, captions=3)
    raw = data.source[index]
    assert raw["images"][0].shape == (6, 8, 3) and len(raw["choices"]) == 3
    rng = np.random.default_rng(0)
    rows = [data.transform(raw, rng) for _ in range(20)]
    prompt = "USER: #\nDescribe the image. ASSISTANT: "
    assert {read(row["input"]) for row in rows} == {f"{prompt}train 3 {i}" for i in range(3)}
    np.testing.assert_allclose(rows[0]["image"][0, 0, 0], [3 / 255, 0, 5 / 255], atol=1e-6)
    assert rows[0]["image"].shape == (1, 4, 6, 3) and rows[0]["image_valid"].all()


def test_outside_training_the_first_text_is_taken(stored):
    for split, name in (("valid", "val"), ("test", "test")):
        data = open_conversations("tokred_pairs", split, data_dir=stored, template="{}", **SIZES)
        texts = set()
        for captions in range(1, STORED):
            index = find("tokred_pairs", split, stored, captions)
            row = data.transform(data.source[index], np.random.default_rng(index))
            texts.add(read(row["target"][row["weight"] > 0]))
        assert texts == {f"{name} {number} 0" for number in range(1, STORED)}


def test_questions_and_answers(stored):
    own = {"text": "qa/answer", "question": "qa/question"}
    source = open_tfds_pairs("tokred_pairs", "train", data_dir=stored, **own)
    choices = {source[i]["choices"] for i in range(STORED)}
    assert ((("<image>\n0?", "20"),), (("<image>\n1?", "21"),)) in choices
    named = open_tfds_pairs(
        "tokred_pairs", "train", data_dir=stored, text="image/filename", ask="x"
    )
    assert {named[i]["choices"][0][0] for i in range(STORED)} == {
        ("<image>\nx", f"{number}.png") for number in range(STORED)
    }


def test_examples_without_a_text_are_named(stored):
    source = open_tfds_pairs("tokred_pairs", "train", data_dir=stored)
    index = find("tokred_pairs", "train", stored, captions=0)
    sentence = (
        rf"^example {index} of tokred_pairs \(train\) must have a text or more in 'captions/t"
    )
    with pytest.raises(ValueError, match=sentence):
        source[index]
    both = open_tfds_pairs("tokred_pairs", "test", data_dir=stored, question="qa/question")
    with pytest.raises(ValueError, match=r"got \d and 2: change text or question\.$"):
        [both[i] for i in range(STORED)]


def test_too_long_texts_are_named(stored):
    how = {"length": 20, "image_size": (4, 6), "data_dir": stored}
    data = open_conversations("tokred_pairs", "train", text="image/filename", **how)
    with pytest.raises(
        ValueError, match=r"^example 1 of tokred_pairs \(train\): length must be at"
    ):
        data.transform(data.source[1], np.random.default_rng(0))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            {"text": "tags"},
            r"^text must be one of the texts \[.*'captions/text'.*\] of tokred_pairs",
        ),
        ({"question": "qa"}, r"^question must be one of the texts \[.*'qa/question'.*\] of "),
        ({"split": "all"}, r"^split must be one of \('train', 'valid', 'test'\), got 'all': "),
    ],
)
def test_bad_calls(arguments, sentence, stored):
    with pytest.raises(ValueError, match=sentence):
        open_tfds_pairs("tokred_pairs", **{"split": "train", "data_dir": stored, **arguments})


def test_another_format_on_disk_is_told_apart(stored, tmp_path):
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    for info in tmp_path.rglob("dataset_info.json"):
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(FileNotFoundError, match=r"in another format .*data_dir='ANOTHER_FOLDER'"):
        open_tfds_pairs("tokred_pairs", "train", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["coco_captions", "coco_captions/2014"])
def test_unprepared_sets_fail_fast_and_say_what_to_run(name, tfds, tmp_path):
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=rf"^{name} is not prepared in .*: run `pip") as e:
        open_conversations(name, "train", data_dir=tmp_path, **SIZES)
    assert time.perf_counter() - start < 10  # a download that is tried takes minutes
    assert f"tfds.builder('{name}'" in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("coco_caption", "coco_captions"),
        ("grid_question", "grid_questions"),
        ("huggingface:coco_captions", "coco_captions"),
    ],
)
def test_unknown_names_get_the_nearest(name, nearest, tfds, tmp_path):
    with pytest.raises(ValueError, match=rf"got '{name}': did you mean '{nearest}'\?$"):
        open_conversations(name, "train", data_dir=tmp_path, **SIZES)


def test_mock_pairs():
    one, again = MockPairs(5)[3], MockPairs(5)[3]
    np.testing.assert_array_equal(one["images"][0], again["images"][0])
    assert one["choices"] == again["choices"] != MockPairs(5)[2]["choices"]
    assert one["choices"] != MockPairs(5, "test")[3]["choices"] and len(one["choices"]) == 5
    assert one["images"][0].shape[-1] == 3 and one["images"][0].dtype == np.uint8
    with pytest.raises(IndexError, match=r"^index must be in 0\.\.4, got 5: "):
        MockPairs(5)[5]
    with pytest.raises(ValueError, match=r"^mock must be at least 1 example, got -1: "):
        MockPairs(-1)
    with pytest.raises(ValueError, match=r"^split must be one of .*, got 'val': "):
        MockPairs(2, "val")


FRESH = """
import sys
from tokred.data.vision_language import open_conversations
data = open_conversations('grid_questions', 'test')
data.transform(data.source[0], None)
heavy = {'tensorflow', 'tensorflow_datasets', 'grain', 'tokenizers'}
assert not heavy & set(sys.modules)
where = {'length': 64, 'image_size': (8, 8), 'data_dir': sys.argv[1]}
try:
    open_conversations('coco_captions', 'train', **where)
except FileNotFoundError as error:
    print(error)
assert 'tensorflow' not in sys.modules
"""


def test_a_fresh_process_imports_lazily_and_fails_fast(tfds, tmp_path):
    command = [sys.executable, "-c", FRESH, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("coco_captions is not prepared in ")
