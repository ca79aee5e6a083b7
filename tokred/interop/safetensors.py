"""Directories as Hugging Face writes them: safetensors, in one file or several, and config.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from tokred.interop.names import Rule, find_rules

ONE, MANY = "model.safetensors", "model.safetensors.index.json"


def is_exported(directory: str | Path) -> bool:
    """Whether it holds such weights."""
    return any((Path(directory) / name).is_file() for name in (ONE, MANY))


def read_settings(directory: str | Path) -> dict[str, Any]:
    """config.json. Raises FileNotFoundError without it."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the directory of an exported model.")
    return json.loads(path.read_text())


def read_params(
    directory: str | Path, rules: Sequence[Rule], wanted: Mapping[str, Any]
) -> dict[str, Array]:
    """Every parameter of `wanted`, shapes with a type and perhaps a sharding, by its path.

    One array after another is read, changed and placed, so that nothing is ever held twice.

    Raises:
      FileNotFoundError: no weights there. ImportError: safetensors is not installed.
      ValueError: stored names that no rule knows, parameters that nothing is stored for, those that
        the model lacks, or other shapes; the sentence names the first.
    """
    files = _files(Path(directory))
    found = find_rules(files, rules)
    for what, names in (
        ("are not stored", [*wanted.keys() - found.keys()]),
        ("are stored, but the model lacks them", [*found.keys() - wanted.keys()]),
    ):
        if names:
            raise ValueError(
                f"{directory}: {len(names)} parameters such as {min(names)!r} {what}; give the "
                "model the shape of config.json there."
            )
    return {path: _place(path, *found[path], files, shape) for path, shape in wanted.items()}


def _files(directory: Path) -> dict[str, Path]:
    """The file of every stored name."""
    if (directory / MANY).is_file():
        where = json.loads((directory / MANY).read_text())["weight_map"]
        return {name: directory / file for name, file in where.items()}
    if not (directory / ONE).is_file():
        raise FileNotFoundError(
            f"{directory} holds neither {ONE} nor {MANY}; convert the weights to safetensors."
        )
    with _open(directory / ONE) as file:
        return {name: directory / ONE for name in file.keys()}  # noqa: SIM118


def _open(path: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            "weights in safetensors need the library of that name; run "
            '`pip install "tokred[export]"`.'
        ) from error
    return safe_open(path, framework="numpy")


def _place(path: str, name: str, rule: Rule, files: Mapping[str, Path], shape: Any) -> Array:
    with _open(files[name]) as file:
        array = np.ascontiguousarray(rule.change(file.get_tensor(name)))
    if array.shape != shape.shape:
        raise ValueError(
            f"{files[name]}: {name!r} gives {path!r} the shape {array.shape}, the model has "
            f"{shape.shape}; give the model the shape of config.json there."
        )
    return jax.device_put(array.astype(shape.dtype), getattr(shape, "sharding", None))
