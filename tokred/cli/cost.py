"""`python -m tokred cost`: where a model's MACs are under a plan, counted and compiled."""

import argparse
import json
from typing import Any

from tokred import viz
from tokred.cli.parser import ROUND_TO, names, positive
from tokred.cost.bench import choose_plan
from tokred.cost.report import cost_report
from tokred.models import (
    VLM,
    Decoder,
    EncoderDecoder,
    ViT,
    decoder_config,
    encoder_decoder_config,
    vit_config,
    vlm_config,
)

LAYER = ("tokens", "attention_macs", "mlp_macs", "reduction_macs", "outer_macs")
WHOLE = (
    "macs", "macs_ratio", "compiled_macs", "params", "activations", "bytes", "temp_bytes",
    "compile_s",
)  # fmt: skip


def add_cost(commands: Any) -> None:
    """The command's arguments."""
    run = commands.add_parser("cost", help="count a model's MACs, bytes and activations by layer")
    run.set_defaults(run=_cost)
    run.add_argument("--model", default="vit_s16", help="as of bench")
    run.add_argument("--methods", default="dense", metavar="NAME,NAME,...")
    run.add_argument("--batch", type=positive, default=1)
    budget = run.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=float, help="every method's keep ratio, in (0, 1]")
    budget.add_argument("--macs", type=float, help="target: this share of the dense MACs")
    run.add_argument("--round-to", type=positive, metavar="EDGE", help=ROUND_TO)
    size = run.add_mutually_exclusive_group()
    size.add_argument("--image-size", type=positive, metavar="PIXELS", help="default 224")
    size.add_argument("--tokens", type=positive, help="of a sequence")
    run.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _cost(args: argparse.Namespace) -> None:
    kind, config = _model(args)
    chosen = dict.fromkeys(["dense", *names(args.methods)])
    rows: list[dict[str, Any]] = []
    for name in chosen:
        plan = choose_plan(config, name, args.keep, args.macs, args.round_to or 1)
        report = cost_report(kind, config, plan, batch=args.batch)
        rows.append({"method": name, **report})
    rows = [row | {"macs_ratio": row["macs"] / rows[0]["macs"]} for row in rows]
    if args.json:
        print(json.dumps({"rows": rows, "model": args.model, "batch": args.batch}))
        return
    print(viz.format_table(rows, WHOLE))
    for row in rows:
        layers = [layer | {"method": _label(row["method"], layer)} for layer in row["layers"]]
        print("\n" + viz.format_table([x | {"tokens": x["queries"]} for x in layers], LAYER))


def _label(method: str, layer: dict[str, Any]) -> str:
    where = "around" if layer["layer"] is None else f"layer {layer['layer']}"
    return " ".join(word for word in (method, layer["part"], where) if word)


def _model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The module and its config."""
    text = {} if args.tokens is None else {"context": args.tokens}
    if args.model.startswith("vit_"):
        return ViT, vit_config(args.model, image_size=args.image_size or 224)
    if args.model.startswith("byt5_"):
        return EncoderDecoder, encoder_decoder_config(args.model, **text)
    if args.model.startswith("vlm_"):
        return VLM, vlm_config(args.model, decoder=text)
    return Decoder, decoder_config(args.model, **text)
