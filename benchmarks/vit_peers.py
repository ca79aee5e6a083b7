"""ViTs beside transformers' under torch, see `benchmarks.peers`."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.peer import Peer, make_environment
from tokred.cost import Rounds, compile_cost, layer_costs, macs, time_rounds
from tokred.cost.bench import forward
from tokred.methods import make_plan
from tokred.models import ViT, ViTConfig, vit_config
from tokred.plan import Plan

Row = dict[str, Any]
PACKAGES = ("torch==2.13.0", "transformers==5.23.0")
METHODS: dict[str, dict[str, Any]] = {"dense": {}, "tome": {"r": 13}, "evit": {"keep": 0.7}}
WAYS = ("eager", "compile")
SIDE = "benchmarks.torch_vit"


def run(args: Any, methods: Sequence[str]) -> tuple[list[Row], dict[str, Any]]:
    """Rows, and what the other side is."""
    config = vit_config(args.model, image_size=args.image_size, dtype=jnp.float32)
    plans = {name: make_plan(name, config.layout, **METHODS[name]) for name in methods}
    spec = {
        "model": sizes_of(config),
        "batch": args.batch,
        "threads": args.threads,
        "counts": {name: counts_of(config, plan) for name, plan in plans.items()},
    }
    peer = Peer(make_environment(args.env, PACKAGES), SIDE, spec)
    try:
        return compare(config, plans, args.batch, args.rounds, peer), peer.about
    finally:
        peer.close()


def sizes_of(config: ViTConfig) -> dict[str, Any]:
    """The same model as fields of transformers' ViTConfig."""
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.feed_width,
        "image_size": config.image_size[0],
        "patch_size": config.patch[0],
        "num_labels": config.classes,
    }


def counts_of(config: ViTConfig, plan: Plan) -> list[int]:
    """Tokens behind the attention of every layer."""
    return [row.mlp for row in layer_costs(config, plan) if row.layer is not None]


def compare(
    config: ViTConfig,
    plans: dict[str, Plan],
    batch: int,
    rounds: int,
    peer: Callable[[str], float],
) -> list[Row]:
    """A row per method and way of the peer: medians of rounds in which all take turns."""
    model, key = ViT(config, rngs=nnx.Rngs(0)), jax.random.key(0)
    images = jax.random.normal(key, (batch, *config.image_size, config.channels))
    ours: dict[str, Callable[[], Any]] = {}
    for name, plan in plans.items():
        f, state = forward(model, plan)
        run = compile_cost(f, state, images, key).run
        ours[name] = lambda run=run, state=state: run(state, images, key)
    theirs: dict[str, list[float]] = {f"{n}/{way}": [] for n in plans for way in WAYS}
    calls: dict[str, Callable[[], Any]] = dict(ours)
    calls |= {name: lambda name=name: theirs[name].append(peer(name)) for name in theirs}
    times = time_rounds(calls, Rounds(rounds))
    rows = []
    for name, plan in plans.items():
        for way in WAYS:
            timed, median = times[name], statistics.median(theirs[f"{name}/{way}"][-rounds:])
            rows.append({
                "method": name, "peer": f"torch {way}",
                "macs_ratio": macs(config, plan) / macs(config),
                "ms": 1e3 * timed.median, "ms_low": 1e3 * timed.low, "ms_high": 1e3 * timed.high,
                "peer_ms": 1e3 * median, "peer_ratio": median / timed.median,
            })  # fmt: skip
    return rows
