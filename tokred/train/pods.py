"""Train steps compiled for whole TPU pods by the TPU compiler itself; no TPU is needed.

python -m tokred.train.pods --out=docs/pods.json --only='v5e-256/*'

ViT-B/16 at 224 pixels, a global batch of 4096, bfloat16 over float32 parameters, AdamW. A row says
what one chip holds and counts, and how often chips talk. Nothing is executed, so nothing is timed
but the compiler, which is told to search little for fast code: for the dense model on v5e-256 that
gives the same collectives and 3 % less temporary memory in an eighth of the processor time.
"""

import fnmatch
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from tokred.methods import make_plan
from tokred.models.vit import ViT, ViTConfig, vit_config
from tokred.plan import Layout, Plan
from tokred.train.cli import Arguments, run
from tokred.train.losses import Objective
from tokred.train.mesh import batch_sharding, make_mesh, replicated, with_places
from tokred.train.optimizer import make_optimizer
from tokred.train.state import Weights, init_state, split_model
from tokred.train.step import make_train_step

Row = dict[str, Any]
AXES = ("data", "fsdp")
BATCH = 4096
MIB = 2**20
QUICKLY = {"exec_time_optimization_effort": -1.0}  # of -1 to 1
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
PLANS: Mapping[str, Callable[[Layout], Plan]] = {
    "dense": lambda layout: make_plan("dense", layout),
    "diffrate": lambda layout: make_plan("diffrate", layout).with_twin("soft"),
    "evit": lambda layout: make_plan("evit", layout, keep=0.7),
    "tome": lambda layout: make_plan("tome", layout, r=13),
}


@dataclass(frozen=True)
class Pod:
    """A slice of TPUs. shape: of the mesh over `AXES`. hbm: per chip, in 10^9 bytes."""

    name: str
    topology: str
    shape: tuple[int, int]
    hbm: int


PODS = (
    Pod("v5e-256", "v5e:16x16", (16, 16), 16),
    Pod("v5p-512", "v5p:8x8x4", (32, 8), 95),  # named after its cores: 256 chips
    Pod("v6e-256", "v6e:16x16", (16, 16), 32),
)


def main(argv: Sequence[str]) -> None:
    """Compiles what --only names and writes every row as soon as it is known."""
    parser = Arguments(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON; other rows in it stay")
    parser.add_argument("--only", default="*", metavar="GLOB", help="of POD/PLAN; all by default")
    args, _ = parser.read(argv)
    chosen = choose(args.only)
    leave_devices_alone()
    config = vit_config("vit_b16", dtype=jnp.bfloat16, drop_path=0.1)
    for pod, name in chosen:
        row = compile_row(pod, name, config, BATCH)
        print(describe(row), flush=True)
        write_row(args.out, row)


def choose(glob: str) -> list[tuple[Pod, str]]:
    """Pods and names of plans. Raises ValueError where the glob fits none."""
    pairs = {f"{pod.name}/{name}": (pod, name) for pod in PODS for name in PLANS}
    found = [pair for label, pair in pairs.items() if fnmatch.fnmatch(label, glob)]
    if not found:
        raise ValueError(f"--only={glob!r} fits none of {', '.join(pairs)}; change the glob.")
    return found


def leave_devices_alone() -> None:
    """Shows JAX the CPU only, unless JAX_PLATFORMS is set; before JAX looks for devices.

    Raises:
      ImportError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("the TPU compiler, libtpu, is not installed; run `make tpu`.")
    # libtpu would ask the cloud, and complain, which TPU this machine is part of.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")


def compile_row(pod: Pod, name: str, config: ViTConfig, batch: int) -> Row:
    """The facts of one step; its layers are computed twice (remat) only if it does not fit else."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=pod.topology)
    mesh = make_mesh(pod.shape, AXES, topology.devices)
    row: Row = {"pod": pod.name, "plan": name, "topology": pod.topology, "chips": mesh.size}
    row |= {"mesh": dict(mesh.shape), "batch": batch, "hbm_gb": pod.hbm}
    row |= {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    for remat in (0, config.depth):
        objective = objective_of(PLANS[name](config.layout), remat)
        start = time.perf_counter()
        try:
            step = lower_step(config, objective, mesh, batch).compile(QUICKLY)
        except jax.errors.JaxRuntimeError as error:
            if remat or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            continue
        row |= {"remat": remat, "compile_s": round(time.perf_counter() - start)}
        row |= facts(step, pod.hbm, abstract_model(config, objective.plan)[1])
        if row["fits"]:
            break
    return row


def objective_of(plan: Plan, remat: int = 0) -> Objective:
    """As in the recipes; what learns its rates is also told its MACs."""
    weight = 10.0 if plan.twin == "soft" else 0.0
    return Objective(plan, label_smoothing=0.1, macs_weight=weight, target=0.5, remat=remat)


def abstract_model(config: ViTConfig, plan: Plan) -> tuple[Any, Weights]:
    """The skeleton and the shapes of all arrays; nothing is allocated."""
    return split_model(nnx.eval_shape(lambda: ViT(config, plan=plan, rngs=nnx.Rngs(0))))


def lower_step(config: ViTConfig, objective: Objective, mesh: Mesh, batch: int) -> Any:
    """The train step of all weights on the mesh, ready to `compile()`; nothing is allocated."""
    skeleton, weights = abstract_model(config, objective.plan)
    names = tuple(weights.params)
    tx = make_optimizer(lr=1e-3, steps=1000, b2=0.999, weight_decay=0.05)
    controllers = objective.plan.init()
    shapes = jax.eval_shape(lambda w: init_state(w, tx, names, controllers=controllers), weights)
    state, rows = with_places(shapes, mesh), batch_sharding(mesh)
    images = (batch, *config.image_size, config.channels)
    data = {
        "image": jax.ShapeDtypeStruct(images, jnp.float32, sharding=rows),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows),
    }
    shardings = (jax.tree.map(lambda x: x.sharding, state), rows, replicated(mesh))
    step: Any = make_train_step(skeleton, objective, tx, names, shardings=shardings)
    return step.lower(state, data, {})


def facts(step: Any, hbm: int, weights: Weights) -> Row:
    """Per chip: memory in MiB, whether all of it fits, 10^9 flops; and what chips say."""
    memory, text = step.memory_analysis(), step.as_text()
    # The state is donated: what comes out lies where it was.
    held = memory.argument_size_in_bytes - memory.alias_size_in_bytes
    held += memory.output_size_in_bytes + memory.temp_size_in_bytes
    held += memory.generated_code_size_in_bytes
    return {
        "arguments_mib": round(memory.argument_size_in_bytes / MIB, 1),
        "temp_mib": round(memory.temp_size_in_bytes / MIB, 1),
        "total_mib": round(held / MIB, 1),
        "fits": held <= hbm * 10**9,
        "gflops": round(step.cost_analysis()["flops"] / 1e9, 1),
        "collectives": count_collectives(text),
        "activation_gathers": count_activation_gathers(text, weights),
    }


@dataclass(frozen=True)
class Collective:
    """One of the compiled text. shapes: of what comes out."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    place: str


def count_collectives(text: str) -> dict[str, int]:
    """How often each of `KINDS` stands in compiled HLO; kinds that are absent are left out."""
    counts = Counter(found.kind for found in find_collectives(text))
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def count_activation_gathers(text: str, weights: Weights) -> int:
    """All-gathers of which a result is as large as none of the parameters."""
    sizes = {math.prod(x.shape) for x in jax.tree.leaves(weights)}
    gathers = [found for found in find_collectives(text) if found.kind == "all-gather"]
    return sum(any(math.prod(shape) not in sizes for shape in g.shapes) for g in gathers)


_HEAD = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
_COLLECTIVE = re.compile(rf"\s+(?:ROOT )?%(\S+) = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)")
_SHAPE = re.compile(r"\b[a-z]+\d+\w*\[([\d,]*)\]")


def find_collectives(text: str) -> set[Collective]:
    """The collectives of compiled HLO, asynchronous ones once.

    TPUs write a reduce-scatter as an all-reduce within a computation 'all-reduce-scatter', and an
    asynchronous collective as parts in several fused computations that share its channel.
    """
    computation, found = "", set()
    for line in text.splitlines():
        if head := _HEAD.match(line):
            computation = head[1]
        elif match := _COLLECTIVE.match(line):
            name, result, kind, start, rest = match.groups()
            shapes = [tuple(map(int, s.split(","))) if s else () for s in _SHAPE.findall(result)]
            shapes = (
                shapes[len(shapes) // 2 :] if start else shapes
            )  # a start gives its operands too
            channel = re.search(r"channel_id=\d+", rest)
            fused = re.match(r"async_collective|fused_computation", computation)
            place = channel[0] if fused and channel else name
            kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else kind
            found.add(Collective(kind, tuple(shapes), place))
    return found


def describe(row: Row) -> str:
    """One line."""
    talk = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items())
    mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
    return (
        f"{row['pod']:8} {row['plan']:9} {row['chips']} chips ({mesh})  per chip: arguments "
        f"{row['arguments_mib']} MiB, temp {row['temp_mib']} MiB, "
        f"{'fits' if row['fits'] else 'DOES NOT FIT'} {row['hbm_gb']} GB"
        f"{' with remat' if row['remat'] else ''}, {row['gflops']} GFLOP  {talk}"
        f"  (compiled in {row['compile_s']} s)"
    )


def write_row(path: Path, row: Row) -> None:
    """The row into the list at `path`, instead of an earlier one of this pod and plan."""
    rows = json.loads(path.read_text()) if path.exists() else []
    key = lambda r: (r["pod"], r["plan"])  # noqa: E731
    rows = sorted([row, *(r for r in rows if key(r) != key(row))], key=key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
