"""Forward passes beside a transformers ViT under torch, in turns within one run:

python -m benchmarks.peers --model vit_s16 --methods dense,tome,evit --batch 8 [--json]

Every method runs here and twice there, eager and under torch.compile, both with as many tokens in
every layer as here. The first run makes an environment for torch (--env; where only CUDA builds
come, install torch there from its CPU index first). While one side runs, the other waits.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokred import viz
from tokred.cli.parser import Parser, names, positive
from tokred.cost import Rounds, compile_cost, layer_costs, macs, time_rounds
from tokred.cost.bench import device_name, forward
from tokred.methods import make_plan
from tokred.models import ViT, ViTConfig, vit_config
from tokred.plan import Plan

Row = dict[str, Any]
PACKAGES = ("torch==2.13.0", "transformers==5.23.0")
METHODS: dict[str, dict[str, Any]] = {"dense": {}, "tome": {"r": 13}, "evit": {"keep": 0.7}}
WAYS = ("eager", "compile")
SIDE = Path(__file__).with_name("torch_vit.py")
COLUMNS = ("macs_ratio", "ms", "ms_low", "ms_high", "peer_ms", "peer_ratio")


class Peer:
    """The other process: says what it is, then runs programs by name and tells how long it took."""

    def __init__(self, python: Path, spec: dict[str, Any]):
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([str(python), str(SIDE)], text=True, **pipes)
        self.versions = json.loads(self._ask(json.dumps(spec)))

    def __call__(self, name: str) -> float:
        """Seconds of one call."""
        return float(self._ask(name))

    def _ask(self, line: str) -> str:
        talk = self._process
        if talk.stdin is None or talk.stdout is None:
            raise RuntimeError("the other process has no pipes.")
        talk.stdin.write(line + "\n")
        talk.stdin.flush()
        answer = talk.stdout.readline()
        if not answer:
            raise RuntimeError(f"the other process ended with exit code {talk.wait()}.")
        return answer

    def close(self) -> None:
        """Ends it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def make_environment(root: Path) -> Path:
    """The interpreter of a virtual environment with `PACKAGES`, made if it is not there."""
    python = root / "bin" / "python"
    if not python.exists():
        venv.create(root, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *PACKAGES]
        subprocess.run(command, check=True)
    return python


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
                "method": name, "peer": way, "macs_ratio": macs(config, plan) / macs(config),
                "ms": 1e3 * timed.median, "ms_low": 1e3 * timed.low, "ms_high": 1e3 * timed.high,
                "peer_ms": 1e3 * median, "peer_ratio": median / timed.median,
            })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Compares and prints."""
    parser = Parser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--model", default="vit_s16", help="vit_{ti,s,b,l} and the patch size")
    parser.add_argument("--image-size", type=positive, default=224)
    parser.add_argument("--methods", default=",".join(METHODS), metavar="NAME,NAME,...")
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument(
        "--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of torch"
    )
    parser.add_argument("--env", type=Path, default=Path(".cache/peers"), help="for torch")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(argv)
    try:
        rows, about = _run(args)
    except ValueError as error:
        print(f"python -m benchmarks.peers: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"rows": rows, **about}) if args.json else _shown(rows, about))
    return 0


def _run(args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    config = vit_config(args.model, image_size=args.image_size, dtype=jnp.float32)
    plans = {name: _plan(config, name) for name in dict.fromkeys(names(args.methods))}
    spec = {
        "model": sizes_of(config),
        "batch": args.batch,
        "threads": args.threads,
        "counts": {name: counts_of(config, plan) for name, plan in plans.items()},
    }
    peer = Peer(make_environment(args.env), spec)
    try:
        rows = compare(config, plans, args.batch, args.rounds, peer)
    finally:
        peer.close()
    told = {"model": args.model, "batch": args.batch, "rounds": args.rounds, "dtype": "float32"}
    return rows, {**told, "device": device_name(), "jax": jax.__version__, **peer.versions}


def _plan(config: ViTConfig, name: str) -> Plan:
    if name not in METHODS:
        raise ValueError(f"method {name!r} has no peer here; choose of {sorted(METHODS)}.")
    return make_plan(name, config.layout, **METHODS[name])


def _shown(rows: Sequence[Row], about: dict[str, Any]) -> str:
    told = ", ".join(f"{name} {value}" for name, value in about.items())
    named = [row | {"method": f"{row['method']}, torch {row['peer']}"} for row in rows]
    return told + "\n" + viz.format_table(named, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
