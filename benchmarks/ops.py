"""Every implementation of the operations that reductions are made of, in turns beside one block:

python -m benchmarks.ops --batch 8 --tokens 197 --width 384 [--json]

Half of the tokens are kept or merged. 'of a block' is the time as a share of one transformer block
of that width, forward only; rows of attention probabilities are those of the first token beside
fused attention, 'rows alone' without it. 'in place': in their old order. An update is that of as
many parameters as a block has.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tokred import ViT, ViTConfig, viz
from tokred.cli.parser import Parser, positive
from tokred.cost import time_rounds
from tokred.cost.bench import device_name
from tokred.maps import Keep
from tokred.ops import attention, attention_rows, gather, put, segment_sum, top_k
from tokred.select import keep_top_k, match_bipartite
from tokred.tokens import make_tokens, move

Calls = dict[str, Callable[[], Any]]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--tokens", type=positive, default=197)
    parser.add_argument("--width", type=positive, default=384, help="a multiple of 64")
    parser.add_argument("--rounds", type=positive, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    shape = (args.batch, args.tokens, args.width)
    times = time_rounds(candidates(*shape), args.rounds)
    block = times["block"].median
    rows = [
        {"method": name, "ms": 1e3 * t.median, "ms_low": 1e3 * t.low, "ms_high": 1e3 * t.high}
        | {"share": t.median / block}
        for name, t in times.items()
    ]
    about = {"batch": shape[0], "tokens": shape[1], "width": shape[2], "rounds": args.rounds}
    about |= {"device": device_name(), "jax": jax.__version__}
    if args.json:
        print(json.dumps({"rows": rows, **about}))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    shown = [row | {"block_share": row["share"]} for row in rows]
    print(viz.format_table(shown, ("ms", "ms_low", "ms_high", "block_share")))


def candidates(batch: int, tokens: int, width: int) -> Calls:
    """What is timed, by name."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (batch, tokens, width))
    scores = jax.random.normal(keys[1], (batch, tokens))
    k = tokens // 2
    index = jnp.sort(jax.random.permutation(keys[2], tokens)[:k])
    index = jnp.broadcast_to(index, (batch, k))
    target = jax.random.randint(keys[3], (batch, tokens), 0, k)
    calls = {"block": _compiled(_block(width), x)}
    for name in ("sort", "top_k"):
        calls[f"top-k: {name}"] = _compiled(partial(top_k, k=k, implementation=name), scores)
    for name in ("take", "one_hot"):
        f = partial(gather, axis=1, implementation=name)
        calls[f"gather half: {name}"] = _compiled(f, x, index)
    for name in ("scatter", "where"):
        f = partial(put, axis=1, implementation=name)
        calls[f"put half back: {name}"] = _compiled(f, x, index, x[:, :k])
    for name in ("scatter", "one_hot"):
        f = partial(segment_sum, k=k, axis=1, implementation=name)
        calls[f"merge to half: {name}"] = _compiled(f, x, target)
    match = lambda y: match_bipartite(y, tokens // 4, prefix=1).source  # noqa: E731
    calls["bipartite match"] = _compiled(match, x[..., :64])
    calls |= {
        "half in place: two sorts": _compiled(partial(_sorted, k=k), scores),
        "half in place: threshold": _compiled(partial(_above_kth, k=k), scores),
        "gather's gradient: scatter-add": _compiled(_gradient, x, index),
        "gather's gradient: put": _compiled(_put_gradient, x, index),
        "gather's gradient: gather": _compiled(_gathered_gradient, x, index),
    }
    return calls | _states(x, index) | _eighth(x) | _updates(width) | _attention(x)


def _sorted(scores: Array, k: int) -> Array:
    return keep_top_k(scores, k, order="position").index


def _above_kth(scores: Array, k: int) -> Array:
    """The same without ties: what reaches the k-th score, in slots that are counted."""
    above = scores >= top_k(scores, k)[0][:, -1:]
    own = jnp.broadcast_to(jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape)
    slots = jnp.where(above, jnp.cumsum(above, axis=-1) - 1, k + own)
    return put(jnp.zeros((len(scores), k), jnp.int32), slots, own, axis=1)


def _gradient(x: Array, index: Array) -> Array:
    rows, back = jax.vjp(lambda x: gather(x, index, axis=1), x)
    return back(rows)[0]


def _put_gradient(x: Array, index: Array) -> Array:
    """The same for indices that are distinct."""
    return put(jnp.zeros_like(x), index, gather(x, index, axis=1), axis=1)


def _gathered_gradient(x: Array, index: Array) -> Array:
    """The same by the inverse of the choice."""
    return Keep(index, x.shape[1]).restore(gather(x, index, axis=1))


def _states(x: Array, index: Array) -> Calls:
    """All fields of tokens through one map: each by itself, or floats side by side."""
    batch, n, width = x.shape
    own = jnp.broadcast_to(jnp.arange(n, dtype=jnp.float32), (batch, n))
    tokens = make_tokens(x, position=own[..., None], size=own, bias=own, extra={"score": own})

    def apart(tokens: Any, index: Array) -> Any:
        return move(tokens, Keep(index, n))

    def together(tokens: Any, index: Array) -> Any:
        fields = (tokens.position, tokens.size, tokens.bias, tokens.extra["score"])
        more = [field.reshape(batch, n, 1) for field in fields]
        rows = gather(jnp.concatenate([tokens.x, *more], axis=-1), index, axis=1)
        return jnp.split(rows, [width, width + 1, width + 2, width + 3], axis=-1)

    return {
        "state of half: field by field": _compiled(apart, tokens, index),
        "state of half: in one array": _compiled(together, tokens, index),
    }


def _eighth(x: Array) -> Calls:
    """A block on an eighth of the tokens, as in Mixture-of-Depths."""
    run, k = _block(x.shape[2]), max(1, x.shape[1] // 8)
    index = jnp.broadcast_to(jnp.arange(k) * 8 % x.shape[1], (len(x), k))

    def routed(x: Array, index: Array) -> Array:
        return put(x, index, run(gather(x, index, axis=1)), axis=1)

    return {
        "block on an eighth: alone": _compiled(run, x[:, :k]),
        "block on an eighth: gather, run, put": _compiled(routed, x, index),
    }


def _updates(width: int) -> Calls:
    """An update in place, and one beside what it updates."""

    def repeated(donated: tuple[int, ...]) -> Callable[[], Any]:
        step = jax.jit(lambda x: 0.999 * x + 1e-3, donate_argnums=donated)
        held = [jnp.zeros((12, width, width))]

        def call() -> Array:
            held[0] = step(held[0])
            return held[0]

        return call

    return {"update: donated": repeated((0,)), "update: kept": repeated(())}


def _block(width: int) -> Callable[[Array], Array]:
    config = ViTConfig(width=width, depth=1, heads=width // 64, classes=0)
    block = ViT(config, rngs=nnx.Rngs(0)).blocks[0]

    def run(x: Array) -> Array:
        tokens = make_tokens(x)
        x = x + block.attend(*block.project(tokens), tokens, tokens)
        return x + block.feed(x)

    return run


def _attention(x: Array) -> Calls:
    batch, tokens, width = x.shape
    q, k, v = (jnp.reshape(x, (batch, tokens, width // 64, 64)) for _ in range(3))
    rows = lambda q, k: attention_rows(q[:, :1], k).mean(-3)  # noqa: E731
    both = lambda q, k, v: (attention(q, k, v), rows(q, k))  # noqa: E731
    return {
        "attention": _compiled(attention, q, k, v),
        "attention and rows": _compiled(both, q, k, v),
        "rows alone": _compiled(rows, q, k),
    }


def _compiled(f: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
    program = jax.jit(f)
    return lambda: program(*arrays)


if __name__ == "__main__":
    main()
