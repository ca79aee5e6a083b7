"""A language model whose cache is made smaller: what it still foretells, says and finds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokred.cache import KVCache
from tokred.fidelity.choose import DENSE, Candidate, at_share, candidates, choose_methods
from tokred.fidelity.times import timed
from tokred.models import Decoder
from tokred.nn.skeleton import split_model
from tokred.plan import Plan

Row = dict[str, Any]
Encode = Callable[[str], Sequence[int]]
BASELINES = ("streaming_llm",)  # with its four sinks a window of the latest entries
DEPTHS = (0.1, 0.5, 0.9)
FIELDS = (
    "perplexity", "perplexity_ratio", "agrees", "needle", "cache_bytes", "cache_ratio", "ms",
    "ms_low", "ms_high", "ms_ratio",
)  # fmt: skip
GREEDY = -1  # in place of an id: whatever is likeliest


class Followed(NamedTuple):
    """nats: Float[B S], surprise at every token · top: Int[B S], the likeliest in its place."""

    nats: np.ndarray
    top: np.ndarray


class Reader:
    """A model under a plan, compiled for `rows` prompts of `prompt` tokens and `steps` more, which
    come one by one."""

    def __init__(self, model: Decoder, plan: Plan, rows: int, prompt: int, steps: int):
        self.model, self.plan = model, plan
        self.rows, self.prompt, self.steps = rows, prompt, steps
        skeleton, self._weights = split_model(model)
        shown = lambda f: jax.jit(lambda p, r, *a: f(skeleton.merge(p, r), *a))  # noqa: E731
        self._prefill, self._follow = shown(self._read_prompt), shown(self._read_on)

    def _read_prompt(self, model: Decoder, ids: Array) -> tuple[Array, KVCache]:
        cache = model.make_cache(
            len(ids), self.prompt + self.steps, plan=self.plan, prompt=self.prompt
        )
        logits, cache, _ = model.extend(ids, cache, plan=self.plan, fresh=True)
        return logits[:, -1], cache

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

    def prefill(self, ids: Int[np.ndarray, "B N"]) -> tuple[Array, KVCache]:
        """The logits behind each prompt, and the cache that is kept of it."""
        return self._prefill(*self._weights, jnp.asarray(ids))

    def follow(self, state: tuple[Array, KVCache], ids: Int[np.ndarray, "B S"]) -> Followed:
        """What follows the prompts, token by token; `GREEDY` for the likeliest one."""
        nats, top = self._follow(*self._weights, *state, jnp.asarray(ids, jnp.int32))
        return Followed(np.asarray(nats), np.asarray(top))

    def cache_bytes(self) -> int:
        """Of what is kept of one prompt, with room for one token more; not computed."""
        short = Reader(self.model, self.plan, 1, self.prompt, 1)
        ids = jax.ShapeDtypeStruct((1, self.prompt), jnp.int32)
        return jax.eval_shape(short._prefill, *self._weights, ids)[1].nbytes()


@dataclass(frozen=True)
class Needles:
    """prompts [D N], each with a sentence that holds a number, at the depth [D] (0: the start), and
    a question at its end; answers [D A], of one token each digit."""

    prompts: np.ndarray
    answers: np.ndarray
    depths: tuple[float, ...] = DEPTHS

    @property
    def length(self) -> int:
        return self.prompts.shape[1]


def plant(
    encode: Encode, filler: Sequence[int], length: int, seed: int = 0, digits: int = 5
) -> Needles:
    """Needles in the first tokens of a text; numbers are drawn. Raises ValueError for a text that
    is too short."""
    rng, prompts, answers = np.random.default_rng(seed), [], []
    question = list(encode("\n\nThe secret number of the green harbour is "))
    for depth in DEPTHS:
        number = list(encode("".join(str(d) for d in rng.integers(0, 10, digits))))
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


def recall(top: Int[np.ndarray, "D S"], answers: Int[np.ndarray, "D A"]) -> np.ndarray:
    """Of each needle the share of digits that are likeliest in their places [D]."""
    return (top[:, : answers.shape[1]] == answers).mean(1)


def compare_caches(
    model: Decoder,
    texts: Int[np.ndarray, "B N+S"],
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
    quest: that are read).
    Row: method, budget, why (it is out of reach, the rest is None then), perplexity of those
    tokens, perplexity_ratio, agrees (share of the dense model's greedy continuation that is
    likeliest here too, given what comes before), needle (`recall`, mean), needles by
    'length@depth', cache_bytes (of one prompt), cache_ratio, ms (one token of every text), ms_low,
    ms_high, ms_ratio.

    Raises:
      ValueError: methods or budgets that do not fit.
    """
    names = choose_methods(model, methods, BASELINES, cache=True)
    prompt = texts.shape[1] - steps
    layout = model.config.layout_of(prompt)
    found = candidates(lambda name, b: at_share(layout, name, b), names, budgets)
    seen: dict[Candidate, Row] = {}
    programs, greedy = {}, None
    for candidate in found:
        try:
            row, state, reader = _read(model, candidate, texts, needles, steps, greedy)
        except ValueError as error:
            if greedy is None:
                raise
            seen[candidate] = {"why": str(error)}  # fewer entries than the method always keeps
            continue
        greedy = row.pop("greedy") if greedy is None else greedy
        seen[candidate] = row
        ids = texts[:, prompt:]
        programs[candidate] = lambda r=reader, s=state, i=ids: r.follow(s, i)
    times = timed(programs, rounds, per=steps, warmup=0)
    return [_row(c, seen[c] | times.get(c, {}), seen[found[0]]) for c in found]


def _read(
    model: Decoder,
    found: Candidate,
    texts: np.ndarray,
    needles: Sequence[Needles],
    steps: int,
    greedy: np.ndarray | None,
) -> tuple[Row, tuple[Array, KVCache], Reader]:
    """All but times; greedy: the dense continuation, None where this is to make it."""
    prompt = texts.shape[1] - steps
    reader = Reader(model, found.plan or DENSE, len(texts), prompt, steps)
    size = reader.cache_bytes()
    state = reader.prefill(texts[:, :prompt])
    nats = reader.follow(state, texts[:, prompt:]).nats
    more = np.full((len(texts), steps), GREEDY) if greedy is None else greedy
    top = reader.follow(state, more).top
    agrees = 1.0 if greedy is None else float((top == greedy).mean())
    row = {
        "perplexity": float(np.exp(nats.mean(dtype=np.float64))),
        "agrees": agrees,
        "needles": _needles(reader, needles),
        "cache_bytes": size,
    }
    return row | ({"greedy": top} if greedy is None else {}), state, reader


def _needles(reader: Reader, needles: Sequence[Needles]) -> dict[str, float]:
    found: dict[str, float] = {}
    for some in needles:
        own = Reader(reader.model, reader.plan, len(some.prompts), some.length, reader.steps)
        own = reader if (own.rows, own.prompt) == (reader.rows, reader.prompt) else own
        ids = np.zeros((own.rows, own.steps), np.int32)
        ids[:, : some.answers.shape[1]] = some.answers
        top = own.follow(own.prefill(some.prompts), ids).top
        each = recall(top, some.answers)
        found |= {f"{some.length}@{d:g}": float(r) for d, r in zip(some.depths, each, strict=True)}
    return found


def _row(found: Candidate, seen: Row, dense: Row) -> Row:
    row = {
        "method": found.method,
        "budget": found.budget,
        "why": found.why,
        **dict.fromkeys(FIELDS),
    }
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
