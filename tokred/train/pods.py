"""Steps compiled for whole TPU pods by the TPU compiler itself; no TPU is needed.

python -m tokred.train.pods --out=docs/pods.json --only='v5e-256/lm_1b/*'

Trained with AdamW, in bfloat16 over float32 parameters: ViT-B/16 at 224 pixels on a global batch of
4096 images, and a decoder of a billion parameters on 256 sequences of 2048 tokens. In bfloat16 it
also decodes one token of each of 256 sequences. ByT5-small learns and applies MrT5's gate on 256
pairs of 1024 and 256 bytes; it is applied in three buckets. A ViT-S/16 before a decoder of 100M
learns Matryoshka queries on 256 images. A row says what one chip holds and
counts, and how often chips talk. Nothing is executed, so nothing is timed but the compiler, which
is told to search little for fast code: for the dense ViT on v5e-256 that gives the same collectives
and 3 % less temporary memory in an eighth of the processor time.
"""

import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokred.models.buckets import encode_in_buckets
from tokred.models.decoder import DecoderConfig
from tokred.models.encoder_decoder_config import EncoderDecoderConfig
from tokred.models.vlm import VLMConfig
from tokred.nn.skeleton import Weights, split_model
from tokred.ops.spread import HEAD_AXIS, batch_axes
from tokred.plan import Plan
from tokred.train.cli import Arguments, run
from tokred.train.collectives import count_activation_gathers, count_collectives
from tokred.train.families import FAMILIES
from tokred.train.losses import ImageObjective, Objective
from tokred.train.mesh import batch_sharding, make_mesh, replicated, with_places
from tokred.train.optimizer import make_optimizer
from tokred.train.pod_tasks import PODS, TASKS, Pod, Task
from tokred.train.seq2seq import Seq2SeqObjective
from tokred.train.state import init_state
from tokred.train.step import make_train_step
from tokred.train.talk import TalkObjective
from tokred.train.text import TextObjective

Row = dict[str, Any]
MIB = 2**20
QUICKLY = {"exec_time_optimization_effort": -1.0}  # of -1 to 1
KEY = ("pod", "model", "step", "plan")  # of a row


def main(argv: Sequence[str]) -> None:
    """Compiles what --only names and writes every row as soon as it is known."""
    parser = Arguments(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON; other rows in it stay")
    parser.add_argument(
        "--only", default="*", metavar="GLOB", help="of POD/MODEL/STEP/PLAN; all by default"
    )
    args, _ = parser.read(argv)
    chosen = choose(args.only)
    leave_devices_alone()
    for pod, task, plan in chosen:
        row = compile_row(pod, task, plan)
        print(describe(row), flush=True)
        write_row(args.out, row)


def choose(glob: str) -> list[tuple[str, Task, str]]:
    """Pods, tasks and names of plans. Raises ValueError where the glob fits none."""
    known = {
        task.label(pod, plan): (pod, task, plan)
        for task in TASKS
        for pod in task.meshes
        for plan in task.plans
    }
    found = [item for label, item in known.items() if fnmatch.fnmatch(label, glob)]
    if not found:
        raise ValueError(f"--only={glob!r} fits none of {', '.join(known)}; change the glob.")
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


def compile_row(pod: str, task: Task, name: str, chips: Pod | None = None) -> Row:
    """The facts of one step. chips: of a pod that `PODS` does not name."""
    chips, axes = chips or PODS[pod], task.meshes[pod]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chips.topology)
    mesh = make_mesh(tuple(axes.values()), tuple(axes), topology.devices)
    row: Row = dict(zip(KEY, (pod, task.model, task.step, name), strict=True))
    row |= {"topology": chips.topology, "chips": mesh.size, "mesh": dict(axes)}
    row |= {"batch": task.batch, "hbm_gb": chips.hbm}
    row |= {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    plan = task.plans[name](task.config.layout)
    for remat in task.remat:
        start = time.perf_counter()
        try:
            with jax.set_mesh(mesh):
                step = lower_task(task, plan, mesh, remat).compile(QUICKLY)
        except jax.errors.JaxRuntimeError as error:
            if remat == task.remat[-1] or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            continue
        row |= {"remat": remat, "compile_s": round(time.perf_counter() - start)}
        parts = mesh.shape.get("tensor", 1)
        row |= facts(step, chips.hbm, abstract_model(task.config, plan)[1], parts)
        if row["fits"]:
            break
    return row


def lower_task(task: Task, plan: Plan, mesh: Mesh, remat: int) -> Any:
    """The step of a task, ready to `compile()`."""
    if task.step == "apply":
        return lower_apply(task.config, plan, mesh, task.batch)
    if task.step == "decode":
        return lower_decode(task.config, plan, mesh, task.batch)
    if task.step == "buckets":
        return lower_buckets(task.config, plan, mesh, task.batch)
    return lower_step(task.config, objective_of(task.config, plan, remat), mesh, task.batch)


def objective_of(config: Any, plan: Plan, remat: int = 0) -> Objective:
    """As in the recipes; what learns its rates is also told its MACs."""
    if isinstance(config, DecoderConfig):
        return TextObjective(plan, remat=remat)
    if isinstance(config, EncoderDecoderConfig):
        return Seq2SeqObjective(plan, padded=False, remat=remat)
    if isinstance(config, VLMConfig):
        return TalkObjective(plan, remat=remat)
    weight = 10.0 if plan.twin == "soft" else 0.0
    return ImageObjective(plan, label_smoothing=0.1, macs_weight=weight, target=0.5, remat=remat)


def abstract_model(config: Any, plan: Plan) -> tuple[Any, Weights]:
    """The skeleton and the shapes of all arrays; nothing is allocated."""
    model = next(f.model for f in FAMILIES.values() if isinstance(config, f.config))
    return split_model(nnx.eval_shape(lambda: model(config, plan=plan, rngs=nnx.Rngs(0))))


def lower_step(config: Any, objective: Objective, mesh: Mesh, batch: int) -> Any:
    """The train step of all weights on the mesh, ready to `compile()`; nothing is allocated."""
    skeleton, weights = abstract_model(config, objective.plan)
    names = tuple(weights.params)
    tx = make_optimizer(lr=1e-3, steps=1000, b2=0.999, weight_decay=0.05)
    controllers = objective.plan.init()
    shapes = jax.eval_shape(lambda w: init_state(w, tx, names, controllers=controllers), weights)
    state, rows = with_places(shapes, mesh), batch_sharding(mesh)
    data = {
        field: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for field, (shape, dtype) in batch_fields(config, batch).items()
    }
    shardings = (jax.tree.map(lambda x: x.sharding, state), rows, replicated(mesh))
    step: Any = make_train_step(skeleton, objective, tx, names, shardings=shardings)
    return step.lower(state, data, {})


def batch_fields(config: Any, batch: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of every field of a batch."""
    if isinstance(config, DecoderConfig):
        types = {field: jnp.int32 for field in TextObjective.fields} | {"weight": jnp.float32}
        return {field: ((batch, config.context), dtype) for field, dtype in types.items()}
    if isinstance(config, EncoderDecoderConfig):
        source, target = (batch, config.context), (batch, config.target_context)
        return {
            "input": (source, jnp.int32),
            "input_valid": (source, jnp.bool_),
            "decoder_input": (target, jnp.int32),
            "target": (target, jnp.int32),
            "weight": (target, jnp.float32),
        }
    if isinstance(config, VLMConfig):
        return talk_fields(config, batch)
    images = (batch, *config.image_size, config.channels)
    return {"image": (images, jnp.float32), "label": ((batch,), jnp.int32)}


def talk_fields(config: VLMConfig, batch: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Prompts that leave room for the images' tokens in the context."""
    n = config.context - config.images * (config.image_tokens() - 1)
    kinds = {"input": jnp.int32, "target": jnp.int32, "weight": jnp.float32}
    kinds |= {"input_valid": jnp.bool_, "question": jnp.bool_}
    images = (batch, config.images, *config.vision.image_size, config.vision.channels)
    given = {"image": (images, jnp.float32), "image_valid": (images[:2], jnp.bool_)}
    return {**{name: ((batch, n), kind) for name, kind in kinds.items()}, **given}


def lower_buckets(config: EncoderDecoderConfig, plan: Plan, mesh: Mesh, batch: int) -> Any:
    """Logits of targets given sources in half, three quarters or all of their slots, ready to
    `compile()`."""
    skeleton, weights = abstract_model(config, plan)
    sizes = (config.context // 2, 3 * config.context // 4)

    def step(weights: Weights, source: Any, target: Any) -> Any:
        model = skeleton.merge(*weights)
        decode = lambda memory: model.decode(target, memory)  # noqa: E731
        return encode_in_buckets(model, source, sizes, decode, plan=plan).value

    rows = batch_sharding(mesh)
    source, target = (
        jax.ShapeDtypeStruct((batch, n), jnp.int32, sharding=rows)
        for n in (config.context, config.target_context)
    )
    jitted: Any = jax.jit(step, out_shardings=rows)
    return jitted.lower(with_places(weights, mesh), source, target)


def lower_apply(config: Any, plan: Plan, mesh: Mesh, batch: int) -> Any:
    """Logits of images, ready to `compile()`."""
    skeleton, weights = abstract_model(config, plan)
    rows = batch_sharding(mesh)
    shape, dtype = batch_fields(config, batch)["image"]
    images = jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    def step(weights: Weights, images: Any) -> Any:
        return skeleton.merge(*weights)(images, plan=plan)[0]

    jitted: Any = jax.jit(step, out_shardings=rows)
    return jitted.lower(with_places(weights, mesh), images)


def lower_decode(config: DecoderConfig, plan: Plan, mesh: Mesh, batch: int) -> Any:
    """One token of every sequence after those in the cache, the likeliest, ready to `compile()`;
    a prompt of seven eighths of the context has been read."""
    skeleton, weights = abstract_model(config, plan)

    length = config.context
    prompt = jax.ShapeDtypeStruct((batch, length * 7 // 8), jnp.int32)

    def read(weights: Weights, ids: Any) -> Any:
        model = skeleton.merge(*weights)
        cache = model.make_cache(batch, length, plan=plan, prompt=ids.shape[1])
        return model.extend(ids, cache, plan=plan, fresh=True)[1]

    def step(weights: Weights, ids: Any, cache: Any) -> Any:
        logits, cache, _ = skeleton.merge(*weights).extend(ids, cache, plan=plan)
        return logits.argmax(-1).astype(ids.dtype), cache

    cache = jax.eval_shape(read, weights, prompt)
    places = jax.tree.map(lambda x: cache_sharding(mesh, x.ndim), cache)
    held = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), cache, places
    )
    rows = batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=rows)
    jitted: Any = jax.jit(step, donate_argnums=2, out_shardings=(rows, places))
    return jitted.lower(with_places(weights, mesh), ids, held)


def cache_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Of a cache's arrays [B], [B G] and more: sequences and key heads lie apart."""
    heads = (HEAD_AXIS,) if ndim > 1 and HEAD_AXIS in mesh.shape else ()
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh), *heads))


def facts(step: Any, hbm: int, weights: Weights, parts: int = 1) -> Row:
    """Per chip: memory in MiB, whether all of it fits, 10^9 flops; and what chips say.

    parts: into how many 'tensor' splits the weights.
    """
    memory, text = step.memory_analysis(), step.as_text()
    # What is donated does not come out anew: it lies where it was.
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
        "activation_gathers": count_activation_gathers(text, weights, parts),
    }


def describe(row: Row) -> str:
    """One line."""
    talk = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items())
    mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
    return (
        f"{' '.join(row[field] for field in KEY)}: {row['chips']} chips ({mesh})  per chip: "
        f"arguments {row['arguments_mib']} MiB, temp {row['temp_mib']} MiB, "
        f"{'fits' if row['fits'] else 'DOES NOT FIT'} {row['hbm_gb']} GB"
        f"{' with remat' if row['remat'] else ''}, {row['gflops']} GFLOP  {talk}"
        f"  (compiled in {row['compile_s']} s)"
    )


def write_row(path: Path, row: Row) -> None:
    """The row into the list at `path`, instead of an earlier one of the same `KEY`."""
    rows = json.loads(path.read_text()) if path.exists() else []
    key = lambda r: tuple(r[field] for field in KEY)  # noqa: E731
    rows = sorted([row, *(r for r in rows if key(r) != key(row))], key=key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
