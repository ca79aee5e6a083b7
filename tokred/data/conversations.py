"""Examples of a vision-language model: images, and a row of ids that has a place for each of them::

    image float32 [I, Y, X, C]  zeros where there is none
    image_valid bool [I]        false there
    input int32 [N]             what the model reads; the placeholder id stands where the tokens of
                                an image go, the n-th one for the n-th image
    target int32 [N]            the id that follows
    weight float32 [N]          1 where the target belongs to an answer or ends it, else 0
    input_valid bool [N]        false at padding, which is at the end
    question bool [N]           the text before the first answer, without placeholders: what a
                                connector may read that is conditioned on text

I, Y, X, C and N are static. A conversation is one turn or more, each a prompt and its answer, which
the end token ends. '<image>' in a prompt, anywhere, is an image's place; in an answer it is text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from tokred.data.augment import normalise, resize
from tokred.data.pairs import expect
from tokred.data.tokenizers import END, ByteTokenizer, Tokenizer

Example = dict[str, Any]
Turn = tuple[str, str]  # prompt and answer

BYTES = ByteTokenizer(sentinels=1)  # the sentinel is the placeholder
IMAGE = "<image>"
BLANK = "{}"
TEMPLATE = "USER: {} ASSISTANT: "
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1], as CLIP's encoders expect them
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ConversationFormat:
    """The sizes of an example and how text becomes ids; all of it static.

    length: N. images: I. template: of every turn's prompt, which takes the place of its {}.
    Raises ValueError for sizes below 1 (images: 0) or a template without one {}.
    """

    length: int
    images: int = 1
    tokenizer: Tokenizer = BYTES
    template: str = BLANK

    def __post_init__(self):
        expect(self.length >= 1, "length", "at least 1 token", self.length)
        expect(self.images >= 0, "images", "at least 0", self.images)
        one = self.template.count(BLANK) == 1
        expect(one, "template", f"a text with one {BLANK} for the prompt", self.template)

    @property
    def placeholder(self) -> int:
        """The id of an image's place: the first sentinel of bytes, else the id above all others."""
        if isinstance(self.tokenizer, ByteTokenizer) and self.tokenizer.sentinels:
            return self.tokenizer.sentinel(0)
        return self.tokenizer.vocab

    @property
    def vocab(self) -> int:
        """The number of ids that a model needs, the placeholder's among them."""
        return max(self.tokenizer.vocab, self.placeholder + 1)


class Row(NamedTuple):
    """A conversation as ids, and which of them belong to answers and to the question."""

    ids: Int32[np.ndarray, " M"]
    answer: Bool[np.ndarray, " M"]
    question: Bool[np.ndarray, " M"]

    @property
    def tokens(self) -> int:
        """The length that an example of it needs: the last id is a target alone."""
        return len(self.ids) - 1


def make_example(
    images: Float32[np.ndarray, "n Y X C"], turns: Sequence[Turn], form: ConversationFormat
) -> Example:
    """The example of a conversation about n images, which are normalised; n may be 0.

    Raises ValueError where it is longer than form.length (nothing is ever cut), has more images
    than form.images, or prompts with another number of '<image>' than there are images.
    """
    row, count = encode_turns(turns, len(images), form), len(images)
    expect(
        row.tokens <= form.length, "length", f"at least {row.tokens} for this example", form.length
    )
    padding = (0, form.length - row.tokens)
    missing = np.zeros((form.images - count, *images.shape[1:]), np.float32)
    return {
        "image": np.concatenate([images, missing]),
        "image_valid": np.arange(form.images) < count,
        "input": np.pad(row.ids[:-1], padding),
        "target": np.pad(row.ids[1:], padding),
        "weight": np.pad(row.answer[1:], padding).astype(np.float32),
        "input_valid": np.arange(form.length) < row.tokens,
        "question": np.pad(row.question[:-1], padding),
    }


def encode_turns(turns: Sequence[Turn], images: int, form: ConversationFormat) -> Row:
    """The row of a conversation about so many images, of any length; errors as of make_example."""
    expect(len(turns) >= 1, "turns", "at least one prompt and its answer", turns)
    expect(images <= form.images, "images", f"at least {images} for this example", form.images)
    parts = []
    for number, (prompt, answer) in enumerate(turns):
        asked = _encode_prompt(form.template.replace(BLANK, prompt), form)
        told = np.append(form.tokenizer.encode(answer), np.int32(END))
        parts.append((asked, False, (asked != form.placeholder) & (number == 0)))
        parts.append((told, True, np.zeros(len(told), bool)))
    ids, answers, questions = zip(*parts, strict=True)
    row = np.concatenate(ids)
    found = int(np.sum(row == form.placeholder))
    expect(found == images, "turns", f"prompts with {images} {IMAGE!r}, one per image", found)
    return Row(row, np.repeat(answers, [len(part) for part in ids]), np.concatenate(questions))


def _encode_prompt(prompt: str, form: ConversationFormat) -> Int32[np.ndarray, " M"]:
    first, *others = map(form.tokenizer.encode, prompt.split(IMAGE))
    place = np.array([form.placeholder], np.int32)
    return np.concatenate([first, *(part for other in others for part in (place, other))])


@dataclass(frozen=True)
class ConversationTransform:
    """A raw example to a finished one.

    Raw: 'name' str, for errors; 'images', uint8 [H, W, C] each; 'choices', conversations of which
    one is taken: a drawn one with draw=True, else the first.
    form: static sizes. size: Y, X, to which images are resized, whatever their aspect. mean, std:
    one number for each of C channels, of pixels in [0, 1].
    Raises ValueError for a size below 1, and on calls, by the example's name, for what make_example
    refuses.
    """

    form: ConversationFormat
    size: tuple[int, int]
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    draw: bool = False

    def __post_init__(self):
        right = len(self.size) == 2 and min(self.size) >= 1
        expect(right, "image_size", "two numbers of pixels, height and width", self.size)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Pure; all randomness is rng's."""
        choices = example["choices"]
        turns = choices[rng.integers(len(choices)) if self.draw else 0]
        images = np.zeros((len(example["images"]), *self.size, len(self.mean)), np.float32)
        try:
            for number, pixels in enumerate(example["images"]):
                images[number] = self._view(pixels)
            return make_example(images, turns, self.form)
        except ValueError as error:
            raise ValueError(f"{example['name']}: {error}") from None

    def _view(self, pixels: UInt8[np.ndarray, "H W C"]) -> Float32[np.ndarray, "Y X C"]:
        return normalise(resize(pixels, *self.size), self.mean, self.std)
