"""Decoders with a smaller cache beside transformers' Llama and kvpress, see `benchmarks.peers`.

Both read a prompt, keep a share of its cache's entries, and write the likeliest tokens behind it.
kvpress chooses once, when the prompt has been read; streaming_llm and tova go on choosing here, as
they were published, so that only they hold no more than that share of the written tokens, too.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from benchmarks.peer import Peer, make_environment
from tokred.cost import Rounds, compile_cost, macs, time_rounds
from tokred.cost.bench import split
from tokred.cost.decoding import token_macs
from tokred.methods import make_plan
from tokred.models import Decoder, DecoderConfig, decoder_config
from tokred.plan import Plan

Row = dict[str, Any]
PACKAGES = ("torch==2.13.0", "kvpress==0.5.5")
LOOK = {"window": 64}  # kvpress's
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "streaming_llm": {},
    "tova": {},
    "snapkv": LOOK,
    "pyramidkv": LOOK,
    "expected_attention": {},
    "knorm": {},
    "keydiff": {},
    "lagkv": {},
    "cur": {},
}
PASSES = ("prompt", "token")
SIDE = "benchmarks.torch_caches"


def run(args: Any, methods: Sequence[str]) -> tuple[list[Row], dict[str, Any]]:
    """Rows, and what the other side is."""
    config = decoder_config(args.model, context=args.tokens + args.steps, dtype=jnp.float32)
    plans = {name: plan_of(config, name, args.keep) for name in methods}
    how = {"batch": args.batch, "tokens": args.tokens, "steps": args.steps}
    spec = {
        "model": sizes_of(config),
        "threads": args.threads,
        "keep": args.keep,
        "methods": list(methods),
        **how,
    }
    peer = Peer(
        make_environment(args.env.with_name(args.env.name + "_caches"), PACKAGES), SIDE, spec
    )
    try:
        held = peer.about.pop("bytes")
        rows = compare(config, plans, args.rounds, peer, **how)
    finally:
        peer.close()
    for row in rows:
        row["peer_bytes"] = held[row["method"]]
    return rows, {**how, "keep": args.keep, **peer.about}


def plan_of(config: DecoderConfig, method: str, keep: float) -> Plan:
    """As kvpress has it."""
    budget = {} if method == "dense" else {"keep": keep}
    return make_plan(method, config.layout, **METHODS[method], **budget)


def sizes_of(config: DecoderConfig) -> dict[str, Any]:
    """The same model as fields of transformers' LlamaConfig."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.shape(0).head_dim,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie,
    }


def compare(
    config: DecoderConfig,
    plans: dict[str, Plan],
    rounds: int,
    peer: Callable[[str], float],
    *,
    batch: int,
    tokens: int,
    steps: int,
) -> list[Row]:
    """Two rows per method, reading a prompt and writing a token: medians of rounds in which all
    take turns."""
    model = Decoder(config, rngs=nnx.Rngs(0))
    ids = jax.random.randint(jax.random.key(1), (batch, tokens), 0, config.vocab)
    calls: dict[str, Callable[[], Any]] = {}
    theirs: dict[str, list[float]] = {}
    held: dict[str, int] = {}
    for name, plan in plans.items():
        ours, held[name] = programs(model, plan, ids, steps)
        calls |= {f"{name}/{kind}": call for kind, call in ours.items()}
        for kind in PASSES:
            theirs[f"{name}/{kind}"] = []
    ask = lambda label: lambda: theirs[label].append(peer(label))  # noqa: E731
    times = time_rounds(calls | {f"peer/{label}": ask(label) for label in theirs}, Rounds(rounds))
    dense, rows = make_plan("dense", config.layout), []
    for name, plan in plans.items():
        written = [token_macs(model, p, {}, tokens) for p in (plan, dense)]
        read = [macs(config, p, tokens=tokens) for p in (plan, dense)]
        for kind, share, of in (("prompt", 1, read), ("token", steps, written)):
            timed = times[f"{name}/{kind}"]
            ms, low, high = (1e3 * t / share for t in (timed.median, timed.low, timed.high))
            peer_ms = 1e3 * statistics.median(theirs[f"{name}/{kind}"][-rounds:]) / share
            rows.append({
                "method": name, "pass": kind, "peer": "kvpress", "macs_ratio": of[0] / of[1],
                "ms": ms, "ms_low": low, "ms_high": high, "peer_ms": peer_ms,
                "peer_ratio": peer_ms / ms, "cache_bytes": held[name],
            })  # fmt: skip
    return rows


def programs(
    model: Decoder, plan: Plan, ids: Array, steps: int
) -> tuple[dict[str, Callable[[], Any]], int]:
    """By pass, compiled: the prompt's cache and likeliest token; so many tokens behind them. And
    the bytes of that cache."""
    merge, params, rest = split(model, plan)
    batch, tokens = ids.shape

    def read(params: Any, rest: Any, ids: Array) -> Any:
        model, _ = merge(params, rest)
        cache = model.make_cache(batch, tokens + steps, plan=plan, prompt=tokens)
        logits, cache, _ = model.extend(ids, cache, plan=plan, fresh=True, last=True)
        return cache, logits.argmax(-1).astype(ids.dtype)

    def write(params: Any, rest: Any, cache: Any, ids: Array) -> Any:
        model, _ = merge(params, rest)

        def step(carry: Any, _: Any) -> Any:
            cache, ids = carry
            logits, cache, _ = model.extend(ids, cache, plan=plan.with_twin("causal"))
            following = logits.argmax(-1).astype(ids.dtype)
            return (cache, following), following[:, 0]

        return jax.lax.scan(step, (cache, ids), length=steps)[1]

    reading = compile_cost(read, params, rest, ids).run
    cache, first = reading(params, rest, ids)
    writing = compile_cost(write, params, rest, cache, first).run
    calls = {
        "prompt": lambda: reading(params, rest, ids),
        "token": lambda: writing(params, rest, cache, first),
    }
    return calls, cache.nbytes()
