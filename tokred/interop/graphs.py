"""Functions as files that run without tokred: StableHLO by `jax.export`, ONNX by jax2onnx.

An artifact is a directory: NAME.stablehlo or NAME.onnx per function, example.npz with inputs and
results of each, and metadata.json, which names them all. StableHLO takes the inputs in the order of
metadata.json and gives a dict; ONNX has them by name, with '.' for '/', and 'new.' before a result
that replaces an input, such as a cache.
"""

import contextlib
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from tokred.interop.lean import lean
from tokred.interop.portable import Function, describe
from tokred.ops import prefer

PLATFORMS = ("cpu", "cuda", "tpu")
BOUND = {"stablehlo": 1e-5, "onnx": 1e-4}
# Every operation in a form that ONNX has.
PLAIN = {"segment_sum": "one_hot", "segment_max": "reference", "put": "where"}


def write_graphs(
    functions: Sequence[Function], out: Path, kind: str, about: Mapping[str, Any]
) -> None:
    """Writes an artifact of kind 'stablehlo' or 'onnx'; about: what metadata.json tells besides.

    Raises:
      ValueError: another kind, or an operation that ONNX lacks. ImportError: without jax2onnx.
    """
    writers: dict[str, Callable[[Function, Path], None]] = {
        "stablehlo": _write_stablehlo, "onnx": _write_onnx
    }  # fmt: skip
    if kind not in writers:
        raise ValueError(f"export: kind {kind!r} must be one of {tuple(writers)}; change --to.")
    if kind == "onnx" and importlib.util.find_spec("jax2onnx") is None:
        raise ImportError('ONNX needs jax2onnx and onnxruntime: pip install "tokred[export]".')
    out.mkdir(parents=True, exist_ok=True)
    examples = {}
    for function in functions:
        writers[kind](function, out / f"{function.name}.{kind}")
        inputs = function.example()
        results = jax.jit(function.call)(*inputs.values())
        examples |= {f"{function.name}/in/{name}": x for name, x in inputs.items()}
        examples |= {f"{function.name}/out/{name}": np.asarray(x) for name, x in results.items()}
    np.savez(out / "example.npz", **examples)
    told = {"kind": kind, "functions": {f.name: describe(f) for f in functions}, **about}
    (out / "metadata.json").write_text(json.dumps(told, indent=1) + "\n")


def _write_stablehlo(function: Function, path: Path) -> None:
    exported = jax.export.export(jax.jit(function.call), platforms=PLATFORMS)
    path.write_bytes(exported(*function.inputs.values()).serialize())


def _write_onnx(function: Function, path: Path) -> None:
    from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]

    specs = list(function.inputs.values())
    with prefer(**PLAIN):
        call = lean(function.call, *specs)
    try:
        with _leaving_nothing():
            to_onnx(
                lambda *arrays: tuple(call(*arrays)),
                specs,
                return_mode="file",
                output_path=str(path),
                input_names=[_plain(name) for name in function.inputs],
                output_names=[_result(name, function) for name in sorted(function.outputs)],
            )
        _run_onnx(function, path)
    except Exception as error:  # the converter and the runtime raise what they like
        raise ValueError(
            f"export: function {function.name!r} does not convert ({_first_line(error)}); give a "
            "fixed --batch, or --to=stablehlo."
        ) from error


def _run_onnx(function: Function, path: Path) -> None:
    """Raises what the runtime raises: a converter may write what does not run."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(str(path))
    inputs = {_plain(name): x for name, x in function.example().items()}
    session.run(None, {x.name: inputs[x.name] for x in session.get_inputs()})


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _leaving_nothing() -> Iterator[None]:
    """Silences what serialisation warns of, and takes back jax2onnx's own `jnp.cumsum`, which it
    leaves behind."""
    cumsum, log = jnp.cumsum, logging.getLogger("onnx_ir")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
        setattr(jnp, "cumsum", cumsum)  # noqa: B010, for pyright


def _plain(name: str) -> str:
    return name.replace("/", ".")


def _result(name: str, function: Function) -> str:
    """Inputs and results share their names' space."""
    return _plain(f"new/{name}" if name in function.inputs else name)


# Runs alone: with jax or onnxruntime, and numpy.
CHECK = """
import json, sys
import numpy as np
out = sys.argv[1]
about = json.load(open(out + "/metadata.json"))
stored = np.load(out + "/example.npz")
worst = {}
for name, told in about["functions"].items():
    inputs = [stored[f"{name}/in/{x}"] for x in told["inputs"]]
    if about["kind"] == "stablehlo":
        from jax import export
        call = export.deserialize(open(f"{out}/{name}.stablehlo", "rb").read()).call
        results = call(*inputs)
    else:
        import onnxruntime
        session = onnxruntime.InferenceSession(f"{out}/{name}.onnx")
        asked = {x.replace("/", "."): a for x, a in zip(told["inputs"], inputs)}
        used = {x.name for x in session.get_inputs()}
        found = session.run(None, {x: a for x, a in asked.items() if x in used})
        results = dict(zip(sorted(told["outputs"]), found))
    off = [np.abs(np.asarray(results[x], np.float64) - stored[f"{name}/out/{x}"].astype(np.float64))
           for x in told["outputs"]]
    worst[name] = max(float(d.max()) if d.size else 0.0 for d in off)
assert "tokred" not in sys.modules
print(json.dumps(worst))
"""


def run_apart(script: str, out: Path, *more: Path) -> str:
    """The last line that a script prints about an export, in a fresh process. Raises ValueError
    with the last line of what went wrong."""
    command = [sys.executable, "-c", script, str(out), *map(str, more)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"export: {out} does not run in a fresh process: {last}")
    return ran.stdout.splitlines()[-1]


def verify_graphs(out: Path) -> dict[str, float]:
    """The largest difference of each function from what was stored, found by a process that has
    never heard of tokred.

    Raises:
      ValueError: a file that does not run, or a difference above 1e-5 (StableHLO) or 1e-4 (ONNX).
    """
    worst = json.loads(run_apart(CHECK, out))
    bound = BOUND[json.loads((out / "metadata.json").read_text())["kind"]]
    far = {name: off for name, off in worst.items() if not off <= bound}
    if far:
        raise ValueError(f"export: {out} differs from the model by {far}, more than {bound}.")
    return worst
