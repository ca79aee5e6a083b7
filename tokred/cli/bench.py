"""`python -m tokred bench`: methods beside the dense model, timed in turns."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tokred import viz
from tokred.cli.parser import ROUND_TO, names, positive
from tokred.cost.bench import Row, bench, device_name
from tokred.cost.bench_decoder import Passes, bench_decoder
from tokred.cost.bench_pairs import bench_pairs
from tokred.cost.bench_talk import bench_talk
from tokred.cost.timing import Rounds
from tokred.models import decoder_config, encoder_decoder_config, vit_config, vlm_config

DTYPES = ("float32", "bfloat16")
COLUMNS = (
    "tokens", "macs", "macs_ratio", "ms", "ms_low", "ms_high", "ms_ratio", "conversion",
    "ms_pipelined", "compile_s", "compile_ratio", "temp_bytes", "share", "cache_bytes",
    "used_bytes",
)  # fmt: skip
# What only one kind of model takes, with its defaults.
IMAGE_ONLY = {"image_size": 224}
TEXT_ONLY = {
    "tokens": 1024, "train": False, "remat": False, "decode": False, "steps": 32, "share": None,
    "best_dense": False, "lengths": None,
}  # fmt: skip
About = tuple[list[Row], dict[str, Any]]


def add_bench(commands: Any) -> None:
    """The command's arguments."""
    run = commands.add_parser("bench", help="time methods against the dense model")
    run.set_defaults(run=_bench)
    sizes = "vit_{ti,s,b,l,h} and the patch size, a decoder such as lm_100m, byt5_small, vlm_120m"
    run.add_argument("--model", default="vit_s16", help=sizes)
    run.add_argument("--methods", metavar="NAME,NAME,...")
    run.add_argument("--batch", type=positive, default=8, help="less where memory does not suffice")
    run.add_argument("--rounds", type=positive, default=10, help="each times all methods once")
    run.add_argument("--seconds", type=float, help="no round of a pass starts after so many")
    run.add_argument("--ahead", type=int, default=0, help="calls under way for ms pipelined")
    budget = run.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=float, help="every method's keep ratio, in (0, 1]")
    budget.add_argument("--macs", type=float, help="target: this share of the dense MACs")
    run.add_argument("--round-to", type=positive, metavar="EDGE", help=ROUND_TO)
    run.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the computation")
    run.add_argument("--json", action="store_true", help="print JSON and nothing else")
    run.add_argument("--out", type=Path, metavar="DIR", help="write JSON there, under a full name")
    images = run.add_argument_group("image models")
    images.add_argument("--image-size", type=positive, metavar="PIXELS", help="default 224")
    _add_text(run.add_argument_group("decoders"))


def _add_text(text: argparse._ArgumentGroup) -> None:
    flag = {"action": "store_true", "default": None}
    text.add_argument("--tokens", type=positive, help="of a sequence, default 1024")
    text.add_argument("--train", **flag, help="time the loss and its gradient too")
    remat = "train in little memory: scanned layers that compute activations again"
    text.add_argument("--remat", **flag, help=remat)
    text.add_argument("--decode", **flag, help="time decoding, token by token, too")
    text.add_argument("--steps", type=positive, help="tokens decoded per call, default 32")
    share = "of layers that decoded tokens enter by chance, default: --keep or 0.125"
    text.add_argument("--share", type=float, help=share)
    lengths = "visual tokens of vlm models, default 1,16,64"
    text.add_argument("--lengths", metavar="M,M,...", help=lengths)
    best = "ratios to the faster of dense with fused and with plain attention"
    text.add_argument("--best-dense", **flag, help=best)


def _bench(args: argparse.Namespace) -> None:
    own = _check_kind(args)
    asked, rounds = args.rounds, Rounds(args.rounds, args.seconds, args.ahead)
    args.rounds = rounds
    kinds = {"vit_": _images, "byt5_": _pairs, "vlm_": _talk}
    kind = next((f for k, f in kinds.items() if args.model.startswith(k)), _decoder)
    rows, told = _in_memory(kind, args)
    given = ("model", "batch", "keep", "round_to", "dtype", *own)
    about = {name: getattr(args, name) for name in given} | {"macs_target": args.macs}
    about |= {"rounds": asked, "device": device_name(), "jax": jax.__version__, **told}
    timed = min(row["rounds"] for row in rows)
    if timed < asked:
        about["untrusted"] = f"{timed} of {asked} rounds in {args.seconds:g} s: spread is a guess"
    text = json.dumps({"rows": rows, **about})
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / file_name(about)).write_text(text + "\n")
    print(text if args.json else show(rows, about))


def file_name(about: dict[str, Any]) -> str:
    """'bench-MODEL-DTYPE-bBATCH-DEVICE-jaxVERSION.json'."""
    device = re.sub(r"[^a-z0-9.]+", "-", about["device"].lower()).strip("-")
    parts = ("bench", about["model"], about["dtype"], f"b{about['batch']}", device)
    return "-".join(parts) + f"-jax{about['jax']}.json"


def _in_memory(kind: Callable[[argparse.Namespace], About], args: argparse.Namespace) -> About:
    """What kind(args) gives, with half the batch as long as memory does not suffice."""
    while True:
        try:
            return kind(args)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or args.batch == 1:
                raise
            args.batch //= 2
            print(f"out of memory; batch {args.batch} is tried", file=sys.stderr)


def show(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """What was timed, and a table."""
    told = ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
    label = lambda row: f"{row['pass']}: {row['method']}" if "pass" in row else row["method"]  # noqa: E731
    named = [row | {"method": label(row)} for row in rows]
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    return told + "\n" + viz.format_table(named, columns)


def _check_kind(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the model's kind, with their defaults set. Raises ValueError for one of
    another kind."""
    text = not args.model.startswith("vit_")
    own, others = (TEXT_ONLY, IMAGE_ONLY) if text else (IMAGE_ONLY, TEXT_ONLY)
    for name in others:
        if getattr(args, name) is not None:
            flag, kind = name.replace("_", "-"), "image models" if text else "decoders"
            raise ValueError(f"--{flag} is for {kind}, not for {args.model!r}; leave it out.")
    for name, default in own.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    return own


def _refuse(args: argparse.Namespace, *options: str) -> None:
    """Raises ValueError for an option that this model does not take."""
    for name in options:
        if getattr(args, name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is not for {args.model!r}; leave it out.")


def _common(args: argparse.Namespace) -> dict[str, Any]:
    budget = {"keep": args.keep, "ratio": args.macs, "round_to": args.round_to or 1}
    return {"batch": args.batch, "rounds": args.rounds, **budget}


def _images(args: argparse.Namespace) -> About:
    config = vit_config(args.model, image_size=args.image_size, dtype=jnp.dtype(args.dtype))
    rows = bench(config, names(args.methods or "dense,tome,evit,topk"), **_common(args))
    return rows, {"path": "packed twin, logits only"}


def _decoder(args: argparse.Namespace) -> About:
    _refuse(args, "lengths")
    if args.share is None:
        args.share = 0.125 if args.keep is None else args.keep
    rows = bench_decoder(
        decoder_config(args.model, dtype=jnp.dtype(args.dtype)),
        names(args.methods or "dense,mod"),
        tokens=args.tokens,
        passes=Passes(args.train, args.decode, args.steps, args.share, args.remat),
        best_dense=args.best_dense,
        **_common(args),
    )
    path = "packed twin forward and train (loss and gradient, no optimizer)"
    path += "; causal twin to decode, layers entered by chance" if args.decode else ""
    fused = "dense with fused attention"
    base = f"the faster of {fused} and with plain attention" if args.best_dense else fused
    return rows, {"path": path, "ratios": f"to {base}"}


def _pairs(args: argparse.Namespace) -> About:
    _refuse(args, "share", "remat", "best_dense", "lengths")
    rows = bench_pairs(
        encoder_decoder_config(args.model, dtype=jnp.dtype(args.dtype)),
        names(args.methods or "dense,mrt5"),
        tokens=args.tokens,
        passes=Passes(args.train, args.decode, args.steps),
        **_common(args),
    )
    return rows, {"path": "packed twin; training under the twin that learns", "ratios": "to dense"}


def _talk(args: argparse.Namespace) -> About:
    _refuse(args, "share", "remat", "best_dense", "train", "decode", "keep", "macs", "round_to")
    dtype = {"dtype": jnp.dtype(args.dtype)}
    rows = bench_talk(
        vlm_config(args.model, vision=dtype, decoder=dtype),
        names(args.methods or "dense,mqt"),
        lengths=[positive(m) for m in names(args.lengths or "1,16,64")],
        tokens=args.tokens,
        batch=args.batch,
        rounds=args.rounds,
    )
    return rows, {"path": "packed twin, prefill", "ratios": "to all visual tokens"}
