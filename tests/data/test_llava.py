"""Conversations from a JSON file and a folder of images, and everything that may be wrong there."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from tokred.data.conversations import BYTES, ConversationFormat
from tokred.data.llava import open_llava
from tokred.data.pipeline import eval_batches
from tokred.data.vision_language import open_conversations

FORM = ConversationFormat(64, images=2)
COLOURS = {"red.png": (255, 0, 0), "deep/blue.jpg": (0, 0, 255)}


def say(*texts):
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


ENTRIES = [
    {"id": "0", "image": "red.png", "conversations": say("<image>\nColour?", "Red.")},
    {
        "id": "1",
        "image": ["deep/blue.jpg", "red.png"],
        "conversations": say("<image>One?", "Blue", "Other<image>?", "Red", "Sure?", "Yes"),
    },
    {"id": 2, "conversations": say("Hello", "World")},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (9, 7), colour).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def write(folder):
    def write(entries):
        path = folder / "mix.json"
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return str(path)

    return write


def read(ids):
    return BYTES.decode(np.where(ids == 259, 3 + ord("#"), ids))


def test_entries_become_examples(write):
    path = write(ENTRIES)
    data = open_conversations(
        path, "all", length=90, images=2, image_size=(4, 6), mean=(0,) * 3, std=(1,) * 3
    )
    assert len(data.source) == 3 and repr(data.source).count("0x") == 0
    rows = [data.transform(data.source[i], np.random.default_rng(0)) for i in range(3)]
    assert [read(row["input"]) for row in rows] == [
        "USER: #\nColour? ASSISTANT: Red.",
        "USER: #One? ASSISTANT: BlueUSER: Other#? ASSISTANT: RedUSER: Sure? ASSISTANT: Yes",
        "USER: Hello ASSISTANT: World",
    ]
    told = [read(row["target"][row["weight"] > 0]) for row in rows]
    assert told == ["Red.", "BlueRedYes", "World"]
    asked = read(rows[1]["input"][rows[1]["question"]])
    assert asked == "USER: One? ASSISTANT: "
    assert [row["image_valid"].tolist() for row in rows] == [[True, False], [True] * 2, [False] * 2]
    blue, red = rows[1]["image"]
    assert red.shape == (4, 6, 3) and (red == [1, 0, 0]).all()
    np.testing.assert_allclose(blue, np.broadcast_to([0, 0, 1], blue.shape), atol=0.02)


def test_batches(write):
    pytest.importorskip("grain")
    data = open_conversations(write(ENTRIES), "all", length=90, images=2, image_size=(4, 6))
    [batch] = eval_batches(data.source, data.transform, batch=3, seed=0)
    assert batch["image"].shape == (3, 2, 4, 6, 3) and batch["input"].shape == (3, 90)


def test_images_of_one_channel_and_another_folder(write, tmp_path_factory):
    other = tmp_path_factory.mktemp("images")
    Image.new("RGBA", (3, 3), (255, 255, 255, 9)).save(other / "red.png")
    source = open_llava(write(ENTRIES[:1]), FORM, folder=other, channels=1)
    [pixels] = source[0]["images"]
    assert pixels.shape == (3, 3, 1) and pixels.dtype == np.uint8 and (pixels == 255).all()


def test_splits_are_disjoint_and_keep_images_together(write):
    entries = [{"id": i, "conversations": say(str(i), "a")} for i in range(150)]
    entries += [{**entry, "id": f"again {entry['id']}"} for entry in ENTRIES[:1] * 5]
    path = write(entries)
    parts = [open_llava(path, FORM, split=s) for s in ("train", "valid", "test")]
    indices = [{entry.index for entry in part.entries} for part in parts]
    assert set.union(*indices) == set(range(155)) and sum(map(len, indices)) == 155
    assert len(indices[0]) > 120 and all(indices)
    assert sum(set(range(150, 155)) <= part for part in indices) == 1


def test_too_long_entries_are_told_or_dropped_and_counted(write):
    path, form = write(ENTRIES), ConversationFormat(16, images=2)
    with pytest.raises(ValueError, match=r"^entry 1 of '.*': length must be at least 29 for .* 16"):
        open_llava(path, form)
    with pytest.warns(
        UserWarning, match=r"has 1 of 3 entries in split 'all' that are long"
    ) as seen:
        source = open_llava(path, form, too_long="drop")
    assert len(seen) == 1 and source.dropped == 1
    assert [entry.index for entry in source.entries] == [0, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_llava(path, FORM, too_long="drop").dropped == 0
    with pytest.raises(ValueError, match=r"must have an entry in split 'all' that fits length=1, "):
        open_llava(path, ConversationFormat(1, images=2), too_long="drop")


@pytest.mark.parametrize(
    "entry, sentence",
    [
        ("text", r"must be an object with 'conversations', a list of pairs of what human and gpt"),
        ({"id": 1}, r"must be an object with 'conversations', "),
        ({"conversations": []}, r"must be an object with 'conversations', "),
        ({"conversations": say("a")}, r"must be an object with 'conversations', "),
        (
            {"conversations": say("a", "b")[::-1]},
            r"must have {'from': 'human', 'value': text} in place 0 of 'conversations', got ",
        ),
        (
            {"conversations": [*say("a"), {"from": "gpt", "value": 3}]},
            r"must have {'from': 'gpt', 'value': text} in place 1 of 'conversations', got .*3}",
        ),
        ({"image": 7, "conversations": say("a", "b")}, r"must have a path or a list of paths as "),
        (
            {"image": "red.png", "conversations": say("a", "b")},
            r"prompts with 1 '<image>',.* got 0",
        ),
        ({"conversations": say("<image>a", "b")}, r"prompts with 0 '<image>', .* got 1: change t"),
        (
            {"image": ["red.png"] * 3, "conversations": say("<image>" * 3, "b")},
            r"images must be at least 3 for this example, got 2: change images\.",
        ),
    ],
)
def test_bad_entries_are_named(entry, sentence, write):
    path = write([ENTRIES[2], entry])
    with pytest.raises(ValueError, match=r"^entry 1 of '[^']*mix.json'") as caught:
        open_llava(path, FORM, too_long="drop")
    caught.match(sentence)
    assert "\n" not in str(caught.value)


def test_missing_images_are_told_when_the_file_is_opened(write):
    gone = {"image": "gone.png", "conversations": say("<image>", "a")}
    with pytest.raises(
        FileNotFoundError, match=r"^entry 1 of .*: image must be an existing file, "
    ):
        open_llava(write([ENTRIES[0], gone, gone]), FORM)


def test_unreadable_images_are_told_when_they_are_read(write, folder):
    source = open_llava(write(ENTRIES), FORM)
    (folder / "red.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^entry 0 of .*: image must be a readable image file, "):
        source[0]
    whole = (folder / "deep/blue.jpg").read_bytes()
    (folder / "deep/blue.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^entry 1 of .*blue\.jpg' \(.*\): replace the file or"):
        source[1]
    with pytest.raises(IndexError, match=r"^index must be in 0\.\.2, got 3: "):
        source[3]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", r"^path must be a JSON file, got '.*mix.json' \(.*line 1 column 2.*\): mend it\.$"),
        ('{"a": 1}', r"^path must be a JSON list of entries, got dict in "),
        ("[]", r"must have an entry in split 'all' that fits length=64, got none of 0: "),
    ],
)
def test_bad_files(text, sentence, write):
    with pytest.raises(ValueError, match=sentence):
        open_llava(write(text), FORM)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"split": "dev"}, r"^split must be one of \('all', 'train', 'valid', 'test'\), got 'dev'"),
        ({"too_long": "cut"}, r"^too_long must be one of \('raise', 'drop'\), got 'cut': "),
        ({"channels": 4}, r"^channels must be one of \(1, 3\), got 4: "),
    ],
)
def test_bad_calls(arguments, sentence, write):
    with pytest.raises(ValueError, match=sentence):
        open_llava(write(ENTRIES), FORM, **arguments)
