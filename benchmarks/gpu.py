"""The tables of a GPU, run by run, each in a process of its own:

python -m benchmarks.gpu --out=benchmarks/results/gpu [--only='vit_*'] [--minutes=25]

ViTs in bfloat16 at 65 % of their MACs, a decoder of a billion parameters read, trained and decoding
behind 4096 and 32 768 tokens; every run is a `python -m tokred bench`, whose JSON it keeps as
OUT/NAME.json. A run whose file is there is not repeated. Where no GPU is in reach the same runs are
tried at small size, each once, nothing is kept, and the table of GPUs is said to be missing.
"""

import argparse
import fnmatch
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokred.cli.bench import show
from tokred.cli.parser import Parser

TIMED = ("--dtype=bfloat16", "--rounds=40", "--seconds=40")
SMALL = {
    "vit": ("--model=vit_ti16", "--image-size=96", "--batch=1", "--rounds=2", "--ahead=1"),
    "lm": ("--model=lm_10m", "--tokens=256", "--steps=4", "--batch=1", "--rounds=2"),
}
MISSING = "The table of GPUs is missing: these are small sizes on a {platform}, kept nowhere."


def runs() -> dict[str, tuple[str, ...]]:
    """Arguments of `tokred bench` by name of the run."""
    methods = "--methods=dense,tome,evit,topk,diffrate,tokenlearner"
    found: dict[str, tuple[str, ...]] = {}
    for model, size in (("vit_b16", 224), ("vit_l16", 384), ("vit_h14", 224)):
        for batch in (1, 32, 256):
            how = (f"--model={model}", f"--image-size={size}", f"--batch={batch}")
            found[f"{model}_{size}_b{batch}"] = (*how, methods, "--macs=0.65", "--ahead=20", *TIMED)
    routed = ("--methods=dense,mod", "--keep=0.125")
    caches = ("--methods=dense,streaming_llm,tova,snapkv,knorm,quest,kivi", "--keep=0.2")
    for tokens, batches in ((4096, (8, 16)), (32_768, (1, 4))):
        where = ("--model=lm_1b", f"--tokens={tokens}")
        read, written = ((*where, f"--batch={batch}") for batch in batches)
        found[f"lm_1b_{tokens}_train"] = (*read, *routed, "--train", "--remat", *TIMED)
        found[f"lm_1b_{tokens}_decode"] = (*written, *caches, "--decode", *TIMED)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is left and prints every table."""
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where JSON is kept")
    parser.add_argument("--only", default="*", metavar="GLOB", help="of the runs' names")
    parser.add_argument("--minutes", type=float, help="no run starts after so many")
    args = parser.parse_args(argv)
    chosen = {name: how for name, how in runs().items() if fnmatch.fnmatch(name, args.only)}
    if not chosen:
        print(f"--only={args.only!r} fits none of {', '.join(runs())}.", file=sys.stderr)
        return 2
    platform = find_platform()
    if platform != "gpu":
        tried = {small(name, how): name for name, how in reversed(chosen.items())}
        chosen = {name: how for how, name in reversed(tried.items())}
    failed = run_all(chosen, args, platform == "gpu")
    if platform != "gpu":
        print(MISSING.format(platform=platform))
    return int(bool(failed))


def find_platform() -> str:
    """'cpu', 'gpu' or 'tpu'; by a process of its own, which lets go of the device's memory."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def small(name: str, how: Sequence[str]) -> tuple[str, ...]:
    """The same run at a size that any machine takes."""
    flags = dict(flag.split("=", 1) for flag in (*how, *SMALL[name.split("_")[0]]) if "=" in flag)
    return (*(f"{k}={v}" for k, v in flags.items()), *(flag for flag in how if "=" not in flag))


def run_all(chosen: Mapping[str, Sequence[str]], args: argparse.Namespace, keep: bool) -> list[str]:
    """Names of the runs that failed."""
    start, failed = time.monotonic(), []
    for name, how in chosen.items():
        path = args.out / f"{name}.json"
        if keep and path.exists():
            told = json.loads(path.read_text())
        elif args.minutes is not None and time.monotonic() - start > 60 * args.minutes:
            print(f"{name}: not run, {args.minutes:g} minutes are over", file=sys.stderr)
            continue
        else:
            told = run_one(name, how, path if keep else None)
        if told is None:
            failed.append(name)
            continue
        print(f"{name}: " + show(told.pop("rows"), told), flush=True)
    return failed


def run_one(name: str, how: Sequence[str], path: Path | None) -> dict[str, Any] | None:
    """What `tokred bench` tells, kept at `path`; None where it fails."""
    command = ["-m", "tokred", "bench", *how, "--json"]
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{name}: failed with exit code {done.returncode}", file=sys.stderr)
        return None
    told = json.loads(done.stdout)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"command": command, **told}, indent=1) + "\n")
    return told


if __name__ == "__main__":
    sys.exit(main())
