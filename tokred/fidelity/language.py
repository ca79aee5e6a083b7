"""A language model whose cache is made smaller: what it still foretells, says and finds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokred.cache import KVCache, choose_heads, score_heads
from tokred.fidelity.choose import ALL, Candidate, Options, at_share, candidates, choose_methods
from tokred.fidelity.prompts import Prompts, keep, kept_bytes, read_prompts
from tokred.fidelity.times import timed
from tokred.methods import list_methods
from tokred.models import Decoder
from tokred.nn.skeleton import split_model
from tokred.plan import Plan

Row = dict[str, Any]
Encode = Callable[[str], Sequence[int]]
BASELINES = ("streaming_llm",)  # with its four sinks a window of the latest entries
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
FIELDS = (
    "perplexity", "perplexity_ratio", "agrees", "needle", "cache_bytes", "cache_ratio", "ms",
    "ms_low", "ms_high", "ms_ratio",
)  # fmt: skip
GREEDY = -1  # in place of an id: whatever is likeliest


State = tuple[Array, KVCache]


class Followed(NamedTuple):
    """nats: Float[B S], surprise at every token · top: Int[B S], the likeliest in its place."""

    nats: np.ndarray
    top: np.ndarray


class Reader:
    """What a model under a plan says behind prompts, `steps` tokens one by one; compiled."""

    def __init__(self, model: Decoder, plan: Plan, steps: int):
        self.model, self.plan, self.steps = model, plan, steps
        skeleton, self._weights = split_model(model)
        self._follow = jax.jit(lambda p, r, *a: self._read_on(skeleton.merge(p, r), *a))

    def _read_on(self, model: Decoder, logits: Array, cache: KVCache, ids: Array) -> Any:
        def step(carry: Any, given: Array) -> Any:
            logits, cache = carry
            top = logits.argmax(-1).astype(jnp.int32)
            ids = jnp.where(given == GREEDY, top, given)
            nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], 1)[:, 0]
            logits, cache, _ = model.extend(ids[:, None], cache, plan=self.plan)
            return (logits[:, -1], cache), (nats, top)

        _, (nats, top) = jax.lax.scan(step, (logits, cache), ids.T)
        return nats.T, top.T

    def keep(self, prompts: Prompts) -> State:
        """What is left of prompts. Raises what `prompts.keep` raises."""
        return prompts.logits, keep(self.model, prompts, self.plan, self.steps)

    def follow(self, state: State, ids: Int[np.ndarray, "B S"]) -> Followed:
        """These tokens behind the prompts; `GREEDY` for the likeliest one."""
        nats, top = self._follow(*self._weights, *state, jnp.asarray(ids, jnp.int32))
        return Followed(np.asarray(nats), np.asarray(top))


@dataclass(frozen=True)
class Needles:
    """prompts [M N], each with a sentence that holds a number, at one of the depths (0: the start),
    and a question at its end; answers [M A], of one token each digit. M is a multiple of the number
    of depths, which take turns."""

    prompts: np.ndarray
    answers: np.ndarray
    depths: tuple[float, ...] = DEPTHS

    @property
    def length(self) -> int:
        return self.prompts.shape[1]


def plant(
    encode: Encode, filler: Sequence[int], length: int, *, each: int = 2, seed: int = 0
) -> Needles:
    """Needles in the first tokens of a text, `each` at every depth of `DEPTHS`; numbers of five
    digits are drawn. Raises ValueError for a text that is too short."""
    rng, prompts, answers = np.random.default_rng(seed), [], []
    question = list(encode("\n\nThe secret number of the green harbour is "))
    for depth in DEPTHS * each:
        number = list(encode("".join(str(d) for d in rng.integers(0, 10, 5))))
        needle = [*question, *number, *encode(".\n\n")]
        room = length - len(needle) - len(question)
        if not 0 < room <= len(filler):
            raise ValueError(
                f"plant: {length} tokens do not hold a needle of {len(needle)}, a question and "
                f"filler, of which there are {len(filler)}; change the length or the text."
            )
        place = round(depth * room)
        prompts.append([*filler[:place], *needle, *filler[place:room], *question])
        answers.append(number)
    return Needles(np.asarray(prompts), np.asarray(answers))


def recall(top: Int[np.ndarray, "M S"], needles: Needles) -> dict[float, float]:
    """By depth the share of numbers all of whose digits are likeliest, each behind the right ones:
    those that greedy decoding gives."""
    answers = needles.answers
    right = (top[:, : answers.shape[1]] == answers).all(1)
    by_depth = right.reshape(-1, len(needles.depths)).mean(0)
    return {depth: float(share) for depth, share in zip(needles.depths, by_depth, strict=True)}


def compare_caches(
    model: Decoder,
    texts: Int[np.ndarray, "B T"],
    needles: Sequence[Needles],
    methods: Sequence[str],
    budgets: Sequence[float],
    *,
    steps: int,
    rounds: int = 3,
) -> list[Row]:
    """One row per method and budget, the dense model first.

    texts: a prompt each, read as a whole under the plan, and `steps` tokens, which are scored one
    by one with what the cache holds by then. budgets: shares of a prompt's entries that stay (with
    quest: that are read; with razor: that stay in heads which do not look far back).
    Row: method, budget, why (it is out of reach, the rest is None then), perplexity of those
    tokens, perplexity_ratio, agrees (share of the dense model's greedy continuation that is
    likeliest here too, given what comes before), needle (`recall`, mean), needles by
    'length@depth', cache_bytes (of one prompt), cache_ratio, ms (one token of every text), ms_low,
    ms_high, ms_ratio.

    Raises:
      ValueError: methods or budgets that do not fit.
    """
    options = found_first(model, methods)
    names = choose_methods(model, methods, BASELINES, cache=True, options=options)
    split = texts.shape[1] - steps
    layout = model.config.layout_of(split)
    at = lambda name, b: at_share(layout, name, b, **options.get(name, {}))  # noqa: E731
    found = candidates(at, names, budgets)
    prompts, more = read_prompts(model, texts[:, :split]), texts[:, split:]
    asked = [(read_prompts(model, some.prompts), some) for some in needles]
    seen: dict[Candidate, Row] = {}
    programs, greedy = {}, np.full(more.shape, GREEDY)
    for candidate in found:
        if candidate.plan is None:
            seen[candidate] = {"why": candidate.why}
            continue
        reader = Reader(model, candidate.plan, steps)
        try:
            state = reader.keep(prompts)
        except ValueError as error:  # fewer entries than the method always keeps
            seen[candidate] = {"why": str(error)}
            continue
        said = reader.follow(state, greedy)
        greedy = said.top if candidate is found[0] else greedy
        nats = reader.follow(state, more).nats
        seen[candidate] = {
            "perplexity": float(np.exp(nats.mean(dtype=np.float64))),
            "agrees": float((said.top == greedy).mean()),
            "needles": find_needles(reader, asked),
            "cache_bytes": kept_bytes(model, prompts, reader.plan),
        }
        programs[candidate] = lambda r=reader, s=state: r.follow(s, more)
    times = timed(programs, rounds, per=steps, warmup=0)
    return [_row(c, seen[c] | times.get(c, {}), seen[found[0]]) for c in found]


def found_first(model: Decoder, methods: Sequence[str], copies: int = 4) -> Options:
    """For methods that need 'heads': the key heads of each layer that look far back, on as long a
    text as the model reads."""
    asked = [m for m in list_methods() if {m.name, ALL} & {*methods}]
    needy = [m.name for m in asked if "heads" in m.needs]
    if not needy:
        return {}
    length, key = model.config.context // copies, jax.random.key(0)
    run = jax.jit(lambda model: score_heads(model, key=key, length=length, copies=copies))
    heads = choose_heads(run(model), model.config.groups)
    return {name: {"heads": heads} for name in needy}


def find_needles(reader: Reader, asked: Sequence[tuple[Prompts, Needles]]) -> dict[str, float]:
    """`recall` of each needle, by 'length@depth'."""
    found: dict[str, float] = {}
    for prompts, needles in asked:
        try:
            top = reader.follow(reader.keep(prompts), needles.answers).top
        except ValueError:  # out of reach for a prompt of this length
            continue
        shares = recall(top, needles)
        found |= {f"{needles.length}@{depth:g}": share for depth, share in shares.items()}
    return found


def _row(found: Candidate, seen: Row, dense: Row) -> Row:
    row = {**found.about, **dict.fromkeys(FIELDS)}
    if "perplexity" not in seen:
        return row | {"needles": {}} | seen
    needles = list(seen["needles"].values())
    return row | seen | {
        "needle": float(np.mean(needles)) if needles else None,
        "perplexity_ratio": seen["perplexity"] / dense["perplexity"],
        "cache_ratio": seen["cache_bytes"] / dense["cache_bytes"],
    }  # fmt: skip


def perplexity(model: Decoder, ids: Int[np.ndarray, "B N"]) -> Float[Array, ""]:
    """Of whole texts, from their second token on."""
    logits = model(jnp.asarray(ids))[0][:, :-1]
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(ids)[:, 1:, None], -1)
    return jnp.exp(nats.mean())
