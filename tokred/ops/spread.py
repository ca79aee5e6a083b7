"""Kernels that the compiler does not split among devices: one on each, as `jax.set_mesh` tells."""

import math
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec, get_abstract_mesh
from jaxtyping import Array

BATCH_AXES = ("data", "fsdp")  # of a mesh: they split the batch
HEAD_AXIS = "tensor"


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what a program is traced for, the devices of `jax.set_mesh` or else
    the default ones."""
    device = getattr(get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Those of the mesh that split a batch."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.shape)


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def told() -> bool:
    """Whether `jax.set_mesh` tells of devices."""
    return not get_abstract_mesh().empty


def uneven(shape: tuple[int, ...], groups: int) -> str:
    """Why q of this shape, with so many key heads, has no equal parts on the mesh; '' if it has."""
    mesh = get_abstract_mesh()
    if _whole(mesh):
        return ""
    if strange := set(mesh.axis_names) - {*BATCH_AXES, HEAD_AXIS}:
        return f"axes {sorted(strange)} of the mesh are none of {(*BATCH_AXES, HEAD_AXIS)}"
    rows, heads = batch_parts(mesh), mesh.shape.get(HEAD_AXIS, 1)
    if len(shape) < 4 or shape[0] % rows or groups % heads:
        return f"q {list(shape)} with {groups} key heads does not split among {dict(mesh.shape)}"
    return ""


def on_each(run: Callable[[dict[str, Array]], Array], arrays: dict[str, Array]) -> Array:
    """run(arrays) for the examples and heads of every device of the mesh; the same in one piece
    where there is one device, or within `jax.shard_map`. arrays: q, k, v [B ... H E] and others
    [B ...]; the result is like q. Gradient: that of run."""
    mesh = get_abstract_mesh()
    if _whole(mesh):
        return run(arrays)
    rows = batch_axes(mesh)
    heads = HEAD_AXIS if HEAD_AXIS in mesh.shape else None

    def place(name: str, ndim: int) -> PartitionSpec:
        last = (heads, None) if name in ("q", "k", "v") else ()
        return PartitionSpec(rows, *(None,) * (ndim - 1 - len(last)), *last)

    places = {name: place(name, x.ndim) for name, x in arrays.items()}
    apart = jax.shard_map(run, in_specs=(places,), out_specs=places["q"], check_vma=False)
    return apart(arrays)


def _whole(mesh: AbstractMesh) -> bool:
    return mesh.empty or mesh.size == 1 or bool(mesh.manual_axes)
