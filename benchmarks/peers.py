"""Forward passes beside other people's code under torch, in turns within one run:

python -m benchmarks.peers --model vit_s16 --methods dense,tome,evit --batch 8 [--json]
python -m benchmarks.peers --model lm_100m --methods dense,snapkv,knorm --tokens 2048 [--json]

ViTs: a transformers ViT, eager and under torch.compile, with as many tokens in every layer as here.
Decoders: a transformers Llama whose cache kvpress makes smaller; a prompt is read, and tokens are
written behind it. The first run of each makes an environment for torch (in --env; where only CUDA
builds come, install torch there from its CPU index first). While one side runs, the other waits.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import cache_peers, vit_peers
from tokred import viz
from tokred.cli.parser import Parser, names, positive
from tokred.cost.bench import device_name

COLUMNS = (
    "macs_ratio",
    "ms",
    "ms_low",
    "ms_high",
    "peer_ms",
    "peer_ratio",
    "cache_bytes",
    "peer_bytes",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compares and prints."""
    parser = Parser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--model", default="vit_s16", help="of a ViT or of a decoder: a size")
    parser.add_argument("--image-size", type=positive, default=224, help="of a ViT")
    parser.add_argument("--tokens", type=positive, default=2048, help="of a decoder's prompt")
    parser.add_argument("--keep", type=float, default=0.2, help="share of a decoder's cache")
    parser.add_argument("--steps", type=positive, default=32, help="tokens behind the prompt")
    parser.add_argument(
        "--methods", metavar="NAME,NAME,...", help="all that have a peer by default"
    )
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument(
        "--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of torch"
    )
    parser.add_argument("--env", type=Path, default=Path(".cache/peers"), help="for torch")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(argv)
    side = vit_peers if args.model.startswith("vit") else cache_peers
    wanted = names(args.methods) if args.methods else tuple(side.METHODS)
    try:
        for name in wanted:
            if name not in side.METHODS:
                known = sorted(side.METHODS)
                raise ValueError(f"method {name!r} has no peer here; choose of {known}.")
        rows, about = side.run(args, tuple(dict.fromkeys(wanted)))
    except ValueError as error:
        print(f"python -m benchmarks.peers: {error}", file=sys.stderr)
        return 2
    told = {"model": args.model, "batch": args.batch, "rounds": args.rounds, "dtype": "float32"}
    about = {**told, "device": device_name(), "jax": jax.__version__, **about}
    print(json.dumps({"rows": rows, **about}) if args.json else show(rows, about))
    return 0


def show(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """What was compared, and a table."""
    told = ", ".join(f"{name} {value}" for name, value in about.items())
    called = lambda row: ", ".join(row[n] for n in ("method", "pass", "peer") if n in row)  # noqa: E731
    named = [row | {"method": called(row)} for row in rows]
    return told + "\n" + viz.format_table(named, [n for n in COLUMNS if n in rows[0]])


if __name__ == "__main__":
    sys.exit(main())
