"""A trained compressor as files that go elsewhere:

python -m tokred export --workdir=RUN --to=stablehlo --out=DIR --verify

--to=stablehlo or onnx: packed inference with its counts baked in, for any batch (or --batch=N), of
what was learned, or of another --method at --keep or --macs; --budgets=1,4,16 are values of the
option that took turns in training (config.train.vary), or keep ratios, each a function of its own.
Neither tokred nor its config is needed to run them. --to=safetensors or orbax: the weights alone,
under the names of the checkpoint. metadata.json tells method, counts, MACs, inputs and their
preprocessing. --verify runs what was written in a fresh process and compares.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokred.interop.graphs import run_apart, verify_graphs, write_graphs
from tokred.interop.portable import Function, functions_of
from tokred.nn.skeleton import Weights
from tokred.plan import Plan
from tokred.train.cli import Arguments
from tokred.train.config import to_json
from tokred.train.evaluate import choose_plans, macs_ratio
from tokred.train.setup import Setup, learned_plan, restore_setup

GRAPHS, WEIGHTS = ("stablehlo", "onnx"), ("safetensors", "orbax")
LICENCE = "not stated; set by --licence"


def make_parser() -> Arguments:
    """The parser of the command."""
    parser = Arguments(prog="python -m tokred export", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="of a run of train.py")
    parser.add_argument("--to", required=True, choices=(*GRAPHS, *WEIGHTS))
    parser.add_argument("--out", type=Path, required=True, help="a directory")
    parser.add_argument("--method", help="default: what was learned, else the dense model")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=float, help="the method's own keep ratio")
    budget.add_argument("--macs", type=float, help="share of the dense model's MACs")
    budget.add_argument("--budgets", help="several, separated by commas")
    parser.add_argument("--batch", type=int, help="of the graphs; default: any")
    parser.add_argument("--tokens", type=int, help="of a prompt or source; default: the data's")
    parser.add_argument("--functions", help="names, separated by commas, to write these alone")
    parser.add_argument("--licence", default=LICENCE, help="of the weights, for metadata.json")
    parser.add_argument("--verify", action="store_true", help="run it in a fresh process, compare")
    return parser


def main(argv: Sequence[str]) -> None:
    """Writes, and verifies if asked."""
    args, _ = make_parser().read(argv)
    setup, weights = restore_setup(args.workdir)
    plans = _plans(setup, weights, args)
    about = {"licence": args.licence, **describe_run(setup, plans)}
    if args.to in WEIGHTS:
        write_weights(weights, args.out, args.to, about)
    else:
        functions = _functions(setup, weights, plans, args)
        write_graphs(functions, args.out, args.to, about)
    print(f"written to {args.out}: {', '.join(sorted(p.name for p in args.out.iterdir()))}")
    if args.verify:
        alone = args.to in WEIGHTS
        told = verify_weights(args.out, args.workdir) if alone else verify_graphs(args.out)
        print(*(f"{name}: largest difference {off:.1e}" for name, off in told.items()), sep="\n")


def _plans(setup: Setup, weights: Weights, args: Any) -> dict[str, Plan]:
    """The plans to write, by the suffix of their functions' names."""
    learned = learned_plan(setup, weights.params)
    method = args.method or ("dense" if learned is None else learned.name)
    if args.budgets is None:
        chosen = choose_plans(
            setup, weights.params, methods=[method], keep=args.keep, ratio=args.macs
        )
        return {"": chosen[method][0]}
    how = setup.config.train
    option = how.vary if how.vary and method == how.method else "keep"
    if "," in option:
        raise ValueError(
            f"--budgets sets one option, but config.train.vary is {option!r}; use --keep."
        )
    known = dict(how.options) if method == how.method else {}
    values = [json.loads(word) for word in args.budgets.split(",")]
    return {
        f"_{value}": setup.plan(method, **{**known, option: value}).with_twin("packed")
        for value in values
    }


def _functions(setup: Setup, weights: Weights, plans: dict[str, Plan], args: Any) -> list[Function]:
    model = setup.skeleton.merge(*jax.device_get(tuple(weights)))
    tokens = args.tokens or setup.tokens
    found = [
        function
        for suffix, plan in plans.items()
        for function in functions_of(model, plan, batch=args.batch, tokens=tokens, suffix=suffix)
    ]
    if args.functions is None:
        return found
    wanted = args.functions.split(",")
    kept = [function for function in found if function.name in wanted]
    if len(kept) < len(wanted):
        known = ", ".join(function.name for function in found)
        raise ValueError(f"--functions={args.functions} must be among {known}.")
    return kept


def describe_run(setup: Setup, plans: dict[str, Plan]) -> dict[str, Any]:
    """What metadata.json tells of a run: methods with counts and MACs, data, config."""
    methods = {
        suffix.removeprefix("_") or "default": {
            "method": plan.name,
            "tokens_by_layer": [row.out for row in setup.counts(plan)],
            "macs_ratio": macs_ratio(setup, plan),
        }
        for suffix, plan in plans.items()
    }
    data = setup.config.data
    return {
        "methods": methods,
        "preprocessing": {"task": setup.config.task, **_preprocessing(data.name), **_text(data)},
        "config": to_json(setup.config),
        "jax": jax.__version__,
    }


def _preprocessing(name: str) -> dict[str, Any]:
    from tokred.data.tfds_images import IMAGE_SETS

    if name not in IMAGE_SETS:
        return {"data": name}
    images = IMAGE_SETS[name]
    return {"data": name, "pixels": "[0, 1]", "mean": images.mean, "std": images.std}


def _text(data: Any) -> dict[str, Any]:
    return {name: data[name] for name in ("tokenizer", "length") if name in data}


def write_weights(weights: Weights, out: Path, kind: str, about: dict[str, Any]) -> None:
    """weights.safetensors, or the Orbax checkpoint weights/, and metadata.json."""
    out.mkdir(parents=True, exist_ok=True)
    flat = {name: np.asarray(jax.device_get(x)) for name, x in weights.params.items()}
    if kind == "orbax":
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((out / "weights").resolve(), flat, force=True)
            checkpointer.wait_until_finished()
    else:
        from safetensors.numpy import save_file

        contiguous = {name: np.ascontiguousarray(x) for name, x in flat.items()}
        save_file(contiguous, out / "weights.safetensors")
    (out / "metadata.json").write_text(json.dumps({"kind": kind, **about}, indent=1) + "\n")


def read_weights(out: Path) -> dict[str, np.ndarray]:
    """What `write_weights` wrote. Raises FileNotFoundError where nothing is."""
    if (out / "weights.safetensors").exists():
        from safetensors.numpy import load_file

        return load_file(out / "weights.safetensors")
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((out / "weights").resolve())


COMPARE = """
import sys
from pathlib import Path
import numpy as np
from tokred.train.export import read_weights
from tokred.train.setup import restore_setup
found, (_, weights) = read_weights(Path(sys.argv[1])), restore_setup(sys.argv[2])
assert set(found) == set(weights.params), set(found) ^ set(weights.params)
print(max(float(np.abs(found[k] - np.asarray(v)).max()) for k, v in weights.params.items()))
"""


def verify_weights(out: Path, workdir: Path) -> dict[str, float]:
    """The largest difference of what a fresh process reads from the run's own checkpoint.

    Raises:
      ValueError: files that cannot be read, or that differ at all.
    """
    worst = float(run_apart(COMPARE, out, workdir))
    if worst:
        raise ValueError(f"export: {out} differs from the checkpoint by {worst}.")
    return {"weights": worst}
