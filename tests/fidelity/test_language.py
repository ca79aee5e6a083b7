"""Caches of a small llama, and needles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokred
from tests.interop.test_parity import FROZEN
from tokred.fidelity import Needles, compare_caches, perplexity, plant, recall
from tokred.fidelity.language import GREEDY, Followed, Reader, find_needles
from tokred.fidelity.prompts import Prompts, keep, read_prompts

RNG = np.random.default_rng(0)
PROMPT, STEPS = 16, 8
TEXTS = RNG.integers(0, 50, (2, PROMPT + STEPS))
NEEDLES = Needles(RNG.integers(0, 50, (2, PROMPT)), RNG.integers(0, 50, (2, 3)), (0.1, 0.9))


@pytest.fixture(scope="module")
def model() -> Any:
    return tokred.load(FROZEN / "llama").model


@pytest.fixture(scope="module")
def rows(model: Any) -> dict:
    names = ["knorm", "snapkv", "kivi", "zipcache", "razor"]
    how = {"steps": STEPS, "rounds": 1}
    found = compare_caches(model, TEXTS, [NEEDLES], names, [1.0, 0.5], **how)
    return {(row["method"], row["budget"]): row for row in found}


def test_the_whole_cache_changes_nothing(rows: dict):
    dense, whole = rows["dense", None], rows["knorm", 1.0]
    assert dense["perplexity_ratio"] == dense["agrees"] == dense["cache_ratio"] == 1
    assert whole["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert whole["agrees"] == whole["cache_ratio"] == 1
    assert whole["needles"] == dense["needles"] and set(dense["needles"]) == {"16@0.1", "16@0.9"}


def test_half_a_cache_is_half_the_bytes(rows: dict):
    half = rows["knorm", 0.5]
    assert half["cache_ratio"] == pytest.approx(9 / 17)  # and room for one token each
    assert half["perplexity"] != rows["dense", None]["perplexity"]
    assert ("streaming_llm", 0.5) in rows  # a window of the latest, as a baseline


def test_heads_that_look_far_back_are_found_first(rows: dict):
    assert rows["razor", 1.0]["perplexity_ratio"] == pytest.approx(1, abs=0.01)  # steps fold
    assert 9 / 17 < rows["razor", 0.5]["cache_ratio"] < 1


def test_what_is_out_of_reach_says_so(rows: dict):
    row = rows["snapkv", 0.5]
    assert "must exceed the 32 entries" in row["why"] and row["perplexity"] is None
    assert "no groups of 32" in rows["kivi", 0.5]["why"]
    assert "between 2 and 8 bits" in rows["zipcache", 1.0]["why"]


def test_scored_with_the_cache_as_without(model: Any):
    reader = Reader(model, tokred.Plan(), PROMPT - 1)
    state = reader.keep(read_prompts(model, TEXTS[:, :1]))
    nats = reader.follow(state, TEXTS[:, 1:PROMPT]).nats
    whole = perplexity(model, TEXTS[:, :PROMPT])
    assert np.exp(nats.mean()) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("method", ["dense", "streaming_llm", "h2o", "adakv", "zipcache", "quest"])
def test_a_prompt_read_once_is_kept_as_if_read_under_the_plan(model: Any, method: str):
    options = {"adakv": {"window": 4}, "h2o": {"recent": 2}}.get(method, {})
    share = {"keep": 0.5} if method not in ("dense", "zipcache") else {}
    plan = tokred.make_plan(method, model.config.layout, **options, **share)
    ids = TEXTS[:, :PROMPT]
    kept = keep(model, read_prompts(model, ids), plan, STEPS)
    empty = model.make_cache(2, PROMPT + STEPS, plan=plan, prompt=PROMPT)
    wanted = model.extend(jnp.asarray(ids), empty, plan=plan, fresh=True)[1]
    assert jax.tree.structure(kept) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, wanted)


def test_greedy_is_what_generate_says(model: Any):
    reader = Reader(model, tokred.Plan(), STEPS)
    state = reader.keep(read_prompts(model, TEXTS[:, :PROMPT]))
    said = reader.follow(state, np.full((2, STEPS), GREEDY)).top
    wanted = tokred.generate(model, jnp.asarray(TEXTS[:, :PROMPT]), steps=STEPS).ids
    np.testing.assert_array_equal(said, wanted)
    np.testing.assert_array_equal(reader.follow(state, said).top, said)


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


class Copyist(Reader):
    """Answers what followed the end of the prompt when it stood there before; sees the last `seen`
    tokens alone."""

    def __init__(self, seen: int):
        self.steps, self.seen = 8, seen

    def keep(self, prompts: Any) -> Any:
        return prompts.logits[:, -self.seen :]

    def follow(self, state: Any, ids: Any) -> Any:
        return Followed(ids, np.asarray([self._answer(list(row)) for row in state]))

    def _answer(self, row: list[int]) -> list[int]:
        starts = [i for i in range(len(row) - 20) if row[i : i + 20] == row[-20:]]
        return (row[starts[0] + 20 :] if starts else [0] * 8)[: self.steps]


def test_who_copies_finds_every_needle():
    needles = plant(encode, encode("filler. " * 100), 300)
    assert needles.prompts.shape == (10, 300)
    asked: Any = [(Prompts(needles.prompts, None), needles)]  # pyright: ignore[reportArgumentType]
    assert find_needles(Copyist(300), asked) == {f"300@{d}": 1 for d in (0.1, 0.3, 0.5, 0.7, 0.9)}
    near = {"300@0.1": 0, "300@0.3": 0, "300@0.5": 0, "300@0.7": 0, "300@0.9": 1}
    assert find_needles(Copyist(120), asked) == near


def test_recall_is_of_whole_numbers():
    answers = np.asarray([[1, 2], [3, 4], [5, 6], [7, 8]])
    needles = Needles(np.zeros((4, 9), int), answers, (0.1, 0.9))
    top = np.asarray([[1, 2, 9], [3, 5, 9], [5, 6, 9], [7, 8, 9]])
    assert recall(top, needles) == {0.1: 1.0, 0.9: 0.5}


def test_no_room_for_a_needle():
    with pytest.raises(ValueError, match="60 tokens do not hold a needle"):
        plant(encode, encode("filler"), 60)


@pytest.mark.parametrize(
    ("method", "match"),
    [("tome", "'tome' does not fit this Decoder"), ("snapvk", "did you mean 'snapkv'")],
)
def test_bad_input(model: Any, method: str, match: str):
    with pytest.raises(ValueError, match=match):
        compare_caches(model, TEXTS, [], [method], [0.5], steps=STEPS)
