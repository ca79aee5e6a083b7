"""The example of a conversation, and the one entry to the data of vision-language models."""

import sys

import numpy as np
import pytest

from tokred.data.conversations import (
    BYTES,
    TEMPLATE,
    ConversationFormat,
    ConversationTransform,
    make_example,
)
from tokred.data.tokenizers import END, PAD, ByteTokenizer, train_bpe
from tokred.data.vision_language import open_conversations

PLACE = 259
SIZES = {"length": 128, "image_size": (4, 6)}


def draw(count, size=(4, 6, 3)):
    return np.random.default_rng(0).standard_normal((count, *size)).astype(np.float32)


def read(ids):
    return BYTES.decode_bytes(np.where(ids == PLACE, 3 + ord("#"), ids)).decode()


def test_fields_and_shapes():
    pixels = draw(1)
    example = make_example(pixels, [("a <image>b?", "yes")], ConversationFormat(12, images=2))
    wanted = {
        "image": ((2, 4, 6, 3), np.float32), "image_valid": ((2,), bool),
        "input": ((12,), np.int32), "target": ((12,), np.int32), "weight": ((12,), np.float32),
        "input_valid": ((12,), bool), "question": ((12,), bool),
    }  # fmt: skip
    assert {key: (x.shape, x.dtype) for key, x in example.items()} == wanted
    np.testing.assert_array_equal(example["image"][0], pixels[0])
    assert not example["image"][1].any() and example["image_valid"].tolist() == [True, False]


def test_rows_of_one_turn():
    example = make_example(draw(1), [("a <image>b?", "yes")], ConversationFormat(12))
    assert read(example["input"]) == "a #b?yes"
    np.testing.assert_array_equal(example["target"][:7], example["input"][1:8])
    assert example["target"][7] == END and (example["target"][8:] == PAD).all()
    assert (example["input"][8:] == PAD).all()
    np.testing.assert_array_equal(np.flatnonzero(example["input_valid"]), np.arange(8))
    np.testing.assert_array_equal(np.flatnonzero(example["weight"]), [4, 5, 6, 7])
    np.testing.assert_array_equal(np.flatnonzero(example["question"]), [0, 1, 3, 4])


def test_all_answers_count_and_the_first_prompt_is_the_question():
    turns = [("<image>a?", "b"), ("c<image>?", "dd"), ("e", "")]
    form = ConversationFormat(40, images=2, template="Q{}A")
    example = make_example(draw(2), turns, form)
    assert read(example["input"]) == "Q#a?AbQc#?AddQeA"
    told = example["target"][example["weight"] > 0]
    assert read(told) == "bdd" and (told == END).sum() == 3
    assert read(example["input"][example["question"]]) == "Qa?A"


def test_a_full_row_fits_exactly():
    example = make_example(draw(1), [("<image>a", "bc")], ConversationFormat(4))
    assert example["input_valid"].all() and example["target"][-1] == END
    with pytest.raises(
        ValueError, match=r"^length must be at least 4 for this example, got 3: change length\.$"
    ):
        make_example(draw(1), [("<image>a", "bc")], ConversationFormat(3))


def test_text_alone():
    example = make_example(draw(0), [("a", "b")], ConversationFormat(4))
    assert example["image"].shape == (1, 4, 6, 3) and not example["image"].any()
    assert not example["image_valid"].any()
    without = make_example(draw(0), [("a", "b")], ConversationFormat(4, images=0))
    assert without["image"].shape == (0, 4, 6, 3)


def test_a_placeholder_in_an_answer_is_text():
    example = make_example(draw(0), [("a", "<image>")], ConversationFormat(12))
    assert PLACE not in example["input"] and "<image>" in read(example["input"])


@pytest.mark.parametrize(
    "count, turns, sentence",
    [
        (1, [("a", "b")], r"^turns must be prompts with 1 '<image>', one per image, got 0: "),
        (0, [("<image>", "b")], r"^turns must be prompts with 0 '<image>', one per .*got 1: "),
        (2, [("<image>", "b"), ("c", "d")], r"^turns must be prompts with 2 .* got 1: "),
        (3, [("<image>" * 3, "b")], r"^images must be at least 3 for this .* got 2: "),
        (0, [], r"^turns must be at least one prompt and its answer, got \[\]: "),
    ],
)
def test_errors_of_an_example(count, turns, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_example(draw(count), turns, ConversationFormat(20, images=2))


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"length": 0}, r"^length must be at least 1 token, got 0: change length\.$"),
        ({"length": 4, "images": -1}, r"^images must be at least 0, got -1: "),
        ({"length": 4, "template": "USER:"}, r"^template must be a text with one {} for .*"),
        ({"length": 4, "template": "{}{}"}, r"^template must be a text with one {} for .*"),
    ],
)
def test_errors_of_a_format(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        ConversationFormat(**fields)


def test_placeholders_of_other_tokenizers():
    plain = ConversationFormat(8, tokenizer=ByteTokenizer())
    assert (plain.placeholder, plain.vocab) == (259, 260)
    many = ConversationFormat(8, tokenizer=ByteTokenizer(5))
    assert (many.placeholder, many.vocab) == (259, 264)
    pytest.importorskip("tokenizers")
    pairs = ConversationFormat(40, tokenizer=train_bpe(["what is in the image"], vocab=270))
    assert (pairs.placeholder, pairs.vocab) == (pairs.tokenizer.vocab, pairs.tokenizer.vocab + 1)
    example = make_example(draw(1), [("what <image>is", "the image")], pairs)
    assert (example["input"] == pairs.placeholder).sum() == 1
    told = example["target"][example["weight"] > 0]
    assert pairs.tokenizer.decode(told) == "the image"


def test_transforms_resize_normalise_and_draw():
    grey = np.full((9, 5, 3), 51, np.uint8)
    raw = {"name": "it", "images": (grey,), "choices": tuple([("<image>", c)] for c in "abc")}
    form, mean, std = ConversationFormat(8), (0.1,) * 3, (0.5,) * 3
    rng = np.random.default_rng(0)
    first = ConversationTransform(form, (4, 6), mean, std)
    for _ in range(5):
        example = first(raw, rng)
        np.testing.assert_allclose(example["image"], np.full((1, 4, 6, 3), 0.2), atol=1e-6)
        assert read(example["input"]) == "#a"
    drawn = ConversationTransform(form, (4, 6), mean, std, draw=True)
    assert {read(drawn(raw, rng)["input"]) for _ in range(30)} == {"#a", "#b", "#c"}
    with pytest.raises(ValueError, match=r"^it: length must be at least 2 for this example, got "):
        ConversationTransform(ConversationFormat(1), (4, 6))(raw, rng)
    with pytest.raises(ValueError, match=r"^image_size must be two numbers of pixels, height and "):
        ConversationTransform(form, (0, 4))


def test_grid_questions_by_name():
    data = open_conversations("grid_questions", "test", cells=(2, 3), images=2, seed=3)
    example = data.transform(data.source[0], np.random.default_rng(0))
    assert example["image"].shape == (2, 16, 24, 1) and data.vocab == 260
    assert example["input"].shape == (data.form.length,) and "seed=3" in repr(data.source)
    same = open_conversations("grid_questions", "test", image_size=(32, 32), length=99)
    assert same.form.length == 99


def test_mock_pairs_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    for name, mean in (("coco_captions", (0.5,)), ("mix.json", (0.5,) * 3)):
        own = {"mean": mean, "std": mean, "template": TEMPLATE}
        data = open_conversations(name, "train", mock=5, **SIZES, **own)
        example = data.transform(data.source[4], np.random.default_rng(0))
        assert len(data.source) == 5 and example["image"].shape == (1, 4, 6, len(mean))
        assert read(example["input"]).startswith("USER: #\nDescribe the image. ASSISTANT: ")


@pytest.mark.parametrize(
    "name, arguments, kind, sentence",
    [
        ("grid_questions", {"rows": 3}, TypeError, r"^options of 'grid_questions' must be among"),
        ("x.json", {**SIZES, "ask": "a"}, TypeError, r"^options of 'x.json' .* got \['ask'\]: rem"),
        ("coco_captions", {**SIZES, "too_long": "drop"}, TypeError, r"got \['too_long'\]: remove"),
        ("coco_captions", {}, TypeError, r"^length and image_size must be given for 'coco_capti"),
        ("grid_questions", {"image_size": (8, 8)}, ValueError, r"^image_size must be \(32, 32\) "),
        ("x.json", SIZES, FileNotFoundError, r"^path must be an existing JSON file, got 'x.json'"),
    ],
)
def test_bad_calls(name, arguments, kind, sentence):
    with pytest.raises(kind, match=sentence):
        open_conversations(name, "train", **arguments)


def test_grid_questions_are_in_bytes():
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"^tokenizer must be a ByteTokenizer for 'grid_question"):
        open_conversations("grid_questions", "train", tokenizer=train_bpe(["a"], vocab=259))
