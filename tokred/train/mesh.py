"""Devices in a mesh, and by rules over paths where every array lies on it.

Axes: 'data' splits the batch; 'fsdp' splits the batch and the parameters with all that mirrors
them (moments, averages); 'tensor' splits heads and hidden units. Any subset, in any sizes.
"""

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from tokred.nn.skeleton import path_name
from tokred.ops.spread import BATCH_AXES, HEAD_AXIS, batch_axes, batch_parts

AXES = (*BATCH_AXES, HEAD_AXIS)
Rule = tuple[str, tuple[str | None, ...]]
Rules = Sequence[Rule]

# (pattern found in the path, axis by dimension); the first that fits wins. Optimizer moments and
# averages of the weights end in the same paths. Axes that the mesh lacks are left out.
RULES: Rules = (
    (r"reductions/", ()),
    (r"(attn|cross)/(query|key|value)/kernel$", ("fsdp", "tensor")),
    (r"attn/(query|key|value)/bias$", ("tensor",)),
    (r"(attn|cross)/out/kernel$", ("tensor", "fsdp")),
    (r"mlp/(fc1|gate|up)/kernel$", ("fsdp", "tensor")),
    (r"mlp/fc1/bias$", ("tensor",)),
    (r"mlp/(gate|up)$", (None, "fsdp", "tensor")),  # of experts
    (r"mlp/down$", (None, "tensor", "fsdp")),
    (r"mlp/router/kernel$", ()),
    (r"mlp/(fc2|down)/kernel$", ("tensor", "fsdp")),
    (r"embed/proj/kernel$", (None, None, None, "fsdp")),
    (r"(head|projector/layers/\d+)/kernel$", ("fsdp",)),
    # By words alone: split over 'fsdp' in its width it would split activations so, not by batch.
    (r"embed/embedding$", ("tensor",)),
    (r"(^|/)(position|cls|registers|scale\d?|bias|table)$", ()),
)


def make_mesh(
    shape: Sequence[int], axes: Sequence[str], devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of all devices (of all processes), or of those given; one -1 takes what is left.

    Raises:
      ValueError: unknown or repeated axes, or a shape that is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape, axes, count = list(shape), tuple(axes), len(devices)
    if len(shape) != len(axes) or len(set(axes)) != len(axes) or not set(axes) <= set(AXES):
        raise ValueError(
            f"config.mesh: axes={axes} with shape={tuple(shape)} must be different names of {AXES}"
            ", one size each; change mesh.axes or mesh.shape."
        )
    if shape.count(-1) == 1:
        known = int(np.prod([n for n in shape if n != -1]))
        shape[shape.index(-1)] = count // max(known, 1)
    if min(shape, default=1) < 1 or int(np.prod(shape)) != count:
        raise ValueError(
            f"config.mesh.shape={tuple(shape)} needs {int(np.prod(shape))} devices, there are "
            f"{count}; change config.mesh.shape (one size may be -1) or the number of devices."
        )
    # Unlike jax.make_mesh this may split an axis of the torus, as 32 x 8 on 16 x 16 chips needs.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def place_by_rules(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The sharding of every leaf, in the same tree.

    Scalars, and with a warning leaves that no rule fits, are replicated.

    Raises:
      ValueError: a rule that does not fit the leaf; the sentence names both.
    """
    leaves, definition = jax.tree_util.tree_flatten_with_path(tree)
    names = [path_name(path) for path, _ in leaves]
    if lost := unmatched(names, leaves, rules):
        warnings.warn(
            f"no sharding rule fits {len(lost)} arrays such as {lost[0]!r}: they are replicated on "
            "all devices; add rules to config.mesh.rules.",
            stacklevel=2,
        )
    shardings = [
        NamedSharding(mesh, _spec(name, leaf.shape, mesh, rules))
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(definition, shardings)


def with_places(shapes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The tree of shapes with a sharding at each; errors as in `place_by_rules`."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        place_by_rules(shapes, mesh, rules),
    )


def unmatched(names: Sequence[str], leaves: Sequence[tuple[Any, Any]], rules: Rules) -> list[str]:
    """Names of the arrays of rank 1 and more that no rule fits."""
    return [
        name
        for name, (_, leaf) in zip(names, leaves, strict=True)
        if leaf.ndim and _find(name, rules) is None
    ]


def _find(name: str, rules: Rules) -> Rule | None:
    return next((rule for rule in rules if re.search(rule[0], name)), None)


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    rule = _find(name, rules) if shape else None
    if rule is None:
        return PartitionSpec()
    pattern, wanted = rule
    if len(wanted) > len(shape):
        raise ValueError(
            f"config.mesh.rules: {pattern!r} names {len(wanted)} axes, {name!r} has shape {shape};"
            " shorten the rule."
        )
    axes = [axis if axis in mesh.shape else None for axis in wanted]
    for size, axis in zip(shape, axes, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"config.mesh.rules: {pattern!r} splits a dimension of {size} of {name!r} (shape "
                f"{shape}) over {axis}={mesh.shape[axis]}, which does not divide it; change "
                "config.mesh.shape or the rule."
            )
    return PartitionSpec(*axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first dimension is the batch."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, batch: int, accumulate: int = 1) -> None:
    """Raises ValueError where the batch does not divide into equal parts."""
    parts = batch_parts(mesh)
    if accumulate < 1 or batch % (parts * accumulate):
        raise ValueError(
            f"config.data.batch={batch} must be a multiple of {parts * accumulate}: {parts} parts "
            f"of the mesh {dict(mesh.shape)} times config.optimizer.accumulate={accumulate}; "
            "change one of the three."
        )


def round_up(mesh: Mesh, batch: int) -> int:
    """The next size that divides into equal parts."""
    parts = batch_parts(mesh)
    return -(-batch // parts) * parts


@functools.cache
def shard_of(mesh: Mesh) -> tuple[int, int]:
    """(which part of every batch this process reads, into how many parts processes divide it).

    Processes that hold the same rows (a mesh whose batch axes are smaller than the number of
    processes) read the same part.
    """
    parts = batch_parts(mesh)
    rows: dict[int, set[int]] = {}
    for device, index in batch_sharding(mesh).devices_indices_map((parts,)).items():
        rows.setdefault(device.process_index, set()).add(index[0].indices(parts)[0])
    groups = sorted({tuple(sorted(r)) for r in rows.values()})
    if sum(map(len, groups)) != parts or len({len(group) for group in groups}) != 1:
        raise ValueError(
            f"config.mesh: on the mesh {dict(mesh.shape)} processes hold overlapping parts of a "
            "batch; let the sizes of the batch axes be multiples of the number of processes."
        )
    return groups.index(tuple(sorted(rows[jax.process_index()]))), len(groups)


def to_mesh(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Array]:
    """Global arrays of the rows that each process has read."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    _, count = shard_of(mesh)
    with jax.transfer_guard("allow"):  # jax counts its own transfers here as implicit
        return {
            name: jax.make_array_from_process_local_data(
                sharding, value, (len(value) * count, *value.shape[1:])
            )
            for name, value in batch.items()
        }
