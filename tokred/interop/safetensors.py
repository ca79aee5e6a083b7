"""Directories as Hugging Face writes them: safetensors, in one file or several, and config.json."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from tokred.interop.names import Found, few

ONE, MANY = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
Get = Callable[[str], np.ndarray]


def is_exported(directory: str | Path) -> bool:
    """Whether it holds such weights."""
    return any((Path(directory) / name).is_file() for name in (ONE, MANY))


def read_settings(directory: str | Path) -> dict[str, Any]:
    """config.json. Raises FileNotFoundError without it."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the directory of an exported model.")
    return json.loads(path.read_text())


def stored_files(directory: str | Path) -> dict[str, Path]:
    """The file of every stored name.

    Raises:
      FileNotFoundError: no weights there. ValueError: pickled ones, which are never read, or a file
        that is cut off or of another kind.
    """
    directory = Path(directory)
    if (directory / MANY).is_file():
        where = json.loads((directory / MANY).read_text())["weight_map"]
        return {name: directory / file for name, file in where.items()}
    if (directory / ONE).is_file():
        with open_file(directory / ONE) as file:
            return {name: directory / ONE for name in file.keys()}  # noqa: SIM118
    found = [p.name for p in directory.glob("*") if p.suffix in PICKLES]
    if found:
        raise ValueError(
            f"{directory} holds {few(found)}: such files can run code when they are read and are "
            "refused; convert them to safetensors where they come from."
        )
    raise FileNotFoundError(
        f"{directory} holds neither {ONE} nor {MANY}; convert the weights to safetensors."
    )


def open_file(path: Path) -> Any:
    """A reader of one file, which loads arrays by name."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            "weights in safetensors need the library of that name; run "
            '`pip install "tokred[export]"`.'
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"{path} is named in {MANY}, but is not there; copy it too.")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is cut off, or no safetensors file ({error}); copy it again."
        ) from None


def place_params(
    where: str, found: Sequence[Found], get: Get, wanted: Mapping[str, Any]
) -> dict[str, Array]:
    """Every parameter of `wanted` by its path: one array after another is read, changed and placed,
    so that nothing is ever held twice. where: for errors.

    Raises:
      ValueError: parameters that nothing is stored for, those that the model lacks, other shapes,
        or NaN; the sentence names the first ten.
    """
    paths = {path for each in found for path in each.paths}
    for what, names in (
        ("are not stored", wanted.keys() - paths),
        ("are stored, but the model lacks them", paths - wanted.keys()),
    ):
        if names:
            raise ValueError(
                f"{where}: {len(names)} parameters {what}: {few(names)}; give the model the shape "
                "of config.json there."
            )
    params = {}
    for each in found:
        if each.paths:
            arrays = each.rule.read(get(each.name))
            for path, array in zip(each.paths, arrays, strict=True):
                params[path] = _place(where, each.name, path, array, wanted[path])
    return params


def _place(where: str, name: str, path: str, array: np.ndarray, shape: Any) -> Array:
    if array.shape != shape.shape:
        raise ValueError(
            f"{where}: {name!r} gives {path!r} the shape {array.shape}, the model has "
            f"{shape.shape}; give the model the shape of config.json there."
        )
    if np.isnan(array).any():
        raise ValueError(f"{where}: {name!r} holds NaN; take the weights from elsewhere.")
    array = np.ascontiguousarray(array, dtype=shape.dtype).reshape(shape.shape)  # of scalars
    return jax.device_put(array, getattr(shape, "sharding", None))


def write_params(
    file: Path,
    get: Get,
    found: Sequence[Found],
    params: Mapping[str, Any],
    metadata: Mapping[str, str] | None,
) -> None:
    """One file with these names, made of parameters, in the types that `get` gives; what no
    parameter is made of is what it gives."""
    from safetensors.numpy import save_file

    tensors = {}
    for each in found:
        old, new = get(each.name), [np.asarray(params[path]) for path in each.paths]
        if new:
            old = each.rule.write(new).astype(old.dtype)
        tensors[each.name] = np.ascontiguousarray(old).reshape(old.shape)
    save_file(tensors, file, metadata=None if metadata is None else dict(metadata))
