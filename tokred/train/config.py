"""Recipes: what a job may be told, python files that fill it in, and overrides by name.

A recipe is a file with `get_config(arg)` that starts from `default_config()`, sets fields and ends
with `finish(config, arg)`. Fields that do not exist are errors with the nearest name.
"""

import ast
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from tokred.plan import nearest
from tokred.train.families import find_family

DTYPES = ("dtype", "param_dtype")
FREE = "options"  # a section with this name takes any key; who reads it checks them
IMAGES = {"name": "digits", "batch": 32, "eval_batch": 359, "shift": 1, "placements": 4}
TEXT = {
    "name": "stdlib", "batch": 16, "eval_batch": 16, "eval_rows": 512, "length": 256,
    "tokenizer": "bytes", "packed": True,
}  # fmt: skip
PAIRS = {
    "name": "stdlib", "batch": 16, "eval_batch": 16, "eval_rows": 256, "length": 256,
    "target_length": None, "languages": (), "packed": True,
}  # fmt: skip
TALK = {
    "name": "grid_questions", "batch": 64, "eval_batch": 100, "eval_rows": 1000, "length": None,
}  # fmt: skip
DATA = {
    "images": IMAGES,
    "text": TEXT | {FREE: {}},
    "seq2seq": PAIRS | {FREE: {}},
    "talk": TALK | {FREE: {}},
}
TURNS = {"remat": 0, "vary": "", "each": (), "rule": "draw", "weights": None, "pivots": ()}
Config = Any  # a locked ConfigDict; type checkers cannot know its fields
BASELINES = ("tome", "evit", "topk", "uniform", "pooling", "random")


def default_config(task: str = "images") -> Config:
    """Every field of a job with its default; locked, so that recipes cannot misspell one.

    task: 'images' (a ViT that classifies), 'text' (a decoder that predicts the next token),
    'seq2seq' (an encoder-decoder on bytes) or 'talk' (answers about images).

    seed: of weights, order of data and draws. start_from: the workdir of a finished run whose
    weights to start from, nothing for fresh ones; start_parts: the same for parts of a model that
    has some. mesh: see `mesh.make_mesh`; rules go before `mesh.RULES`. model: fields of the task's
    model. data: see `inputs`; mock: number of made-up examples instead of real ones, 0 for none.
    beside: methods with their options that are part of every plan but the dense one, see `Beside`.
    train: the first stage, under a method with its options (a learned method in its soft form); 0
    steps for none; macs: what the whole plan may cost, as a share of the dense model, for which the
    method's keep is solved; remat: see `Call`; vary: an option of the method, or several with
    commas, that takes the values of `each` in turn; rule, weights, pivots: see `Varied`; trainable:
    a regular expression over the parameters that learn, '' for all. align: a stage before it, for
    instance of a connector alone; 0 steps for none. optimizer: see `make_optimizer`; ema,
    accumulate: see `make_train_step`. loss: mixup to mix_switch are the fields of `Mixing`.
    distill: of the first stage, from the dense model in another workdir; see `Teacher`. rates: a
    second stage that trains the rates of a method alone, 0 steps for none. finetune: of every
    evaluated row. evaluate.macs: the budget where nothing is learned, as a share of the dense
    model. checkpoint: see `Checkpoints`; a checkpoint every so many steps, an evaluation before
    each if best > 0.
    """
    optimizer = {"warmup": 0.1, "schedule": "cosine", "end": 0.0, "b1": 0.9, "b2": 0.99}
    optimizer |= {"clip": 1.0, "layer_decay": 1.0, "scales": (), "ema": 0.0, "accumulate": 1}
    mixing = {"mixup": 0.0, "cutmix": 0.0, "mix_share": 1.0, "mix_switch": 0.5}
    config: Config = ConfigDict(
        {
            "task": task,
            "seed": 0,
            "start_from": None,
            "start_parts": {"vision": None, "decoder": None} if task == "talk" else {},
            "mesh": {"shape": (-1,), "axes": ("data",), "rules": ()},
            "model": _model_defaults(task),
            "data": {
                **DATA[task],
                "data_dir": None,
                "threads": 1,
                "mock": 0,
            },
            "align": {"steps": 0, "lr": 1e-3, "trainable": r"^(projector|.*reductions)/"},
            "beside": {},
            "train": {
                "steps": 1000,
                "method": "dense",
                "options": {},
                "macs": None,
                "trainable": "",
                "remat": 0,
                **TURNS,
            },
            "optimizer": {"lr": 1e-3, "weight_decay": 0.0, **optimizer},
            "loss": {"label_smoothing": 0.0, "aux_weight": 1.0, **mixing},
            "distill": {"workdir": None, "logits": 0.5, "features": 0.0, "temperature": 1.0},
            "rates": {
                "steps": 0,
                "method": "diffrate",
                "options": {},
                "lr": 0.05,
                "end": 1.0,
                "remat": 0,
                "target": 0.5,
                "weight": 10.0,
                "unit": "ratio",
            },
            "finetune": {"steps": 0, "lr": 1e-4},
            "evaluate": {
                "methods": BASELINES if task == "images" else (),
                "macs": 0.6,
                "rounds": 20,
                "time_batch": 64,
                "pictures": 4,
            },
            "checkpoint": {"every": 1000, "latest": 1, "periodic": 0, "best": 0},
            "log": {"every": 50, "tensorboard": True, "progress": True},
        }
    )
    config.lock()
    for section in (config.train, config.rates, config.data):
        if FREE in section:
            section[FREE].unlock()
    return config


def _model_defaults(task: str) -> dict[str, Any]:
    return _defaults(find_family(task).config)


def _defaults(kind: type, **changes: Any) -> dict[str, Any]:
    """The fields of a model's config; those that are configs themselves, as sections."""
    found = {}
    for field in dataclasses.fields(kind):
        part, more = field.metadata.get("section", (None, {}))
        found[field.name] = field.default if part is None else _defaults(part, **more)
    types = {"dtype": None, "param_dtype": "float32"} if "param_dtype" in found else {}
    return found | types | changes


def finish(config: Config, arg: str) -> Config:
    """The recipe, or for arg='smoke' a copy that runs in seconds.

    Raises:
      ValueError: another arg.
    """
    if arg not in ("", "smoke"):
        raise ValueError(f"recipe argument {arg!r} is unknown; use ':smoke' or none.")
    return shrink(config) if arg else config


def shrink(config: Config) -> Config:
    """A narrow model and a few steps: everything runs, nothing is learned."""
    small = config.copy_and_resolve_references()
    with small.unlocked():
        if config.task == "talk":
            return _shrink_talk(small)
        small.model.update({"width": 16, "depth": 4, "heads": 2})
        if config.task != "images":
            return _shrink_text(small)
        small.train.steps = min(small.train.steps, 4)
        small.rates.steps = min(small.rates.steps, 3)
        small.finetune.steps = min(small.finetune.steps, 2)
        small.data.update({"batch": 8, "placements": 1})
        small.evaluate.update({"rounds": 2, "time_batch": 8, "pictures": 2})
        small.checkpoint.every = small.log.every = 2
        if small.data.name != "digits":
            small.data.mock = 32
            small.model.update({"patch": (4, 4), "image_size": (32, 32)})
            small.data.eval_batch = 16
        if small.start_from:  # the other run does not exist at smoke size
            small.start_from, small.train.steps = None, 4
    return small


def _shrink_text(small: Config) -> Config:
    if small.task == "text":
        small.model.update({"kv_heads": None, "head_dim": None, "hidden": None, "context": 32})
    else:
        small.model.update({"head_dim": 8, "hidden": 32, "context": 64, "target_context": 64})
    length = 32 if small.task == "text" else 64
    if small.data.get("languages"):
        small.data.mock = 64
    small.data.update({"batch": 8, "eval_batch": 8, "eval_rows": 16, "length": length})
    small.train.steps = min(small.train.steps, 4)
    small.evaluate.update({"rounds": 2, "time_batch": 8})
    small.checkpoint.every = small.log.every = 2
    return small


def _shrink_talk(small: Config) -> Config:
    small.model.vision.update({"width": 16, "depth": 2, "heads": 2})
    small.model.decoder.update({"width": 16, "depth": 2, "heads": 2, "hidden": 32})
    small.data.update({"batch": 8, "eval_batch": 8, "eval_rows": 16})
    small.align.steps = min(small.align.steps, 2)
    small.train.steps = min(small.train.steps, 4)
    small.rates.steps = min(small.rates.steps, 3)
    small.evaluate.update({"rounds": 2, "time_batch": 8})
    small.checkpoint.every = small.log.every = 2
    return small


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The config of 'configs/NAME.py' or 'configs/NAME.py:smoke', changed by 'a.b=value' strings.

    Raises:
      FileNotFoundError: no such file. ValueError: not a recipe, an unknown field, or a value of
        another type.
    """
    path, _, arg = recipe.partition(":")
    try:
        config = _find_get_config(Path(path))(arg)
    except (KeyError, AttributeError) as error:
        raise ValueError(f"recipe {path!r} sets a field that does not exist: {error}.") from error
    for override in overrides:
        set_field(config, *_split_override(override))
    return config


def _find_get_config(path: Path) -> Callable[[str], Config]:
    if not path.is_file():
        known = [str(p) for p in sorted(Path("configs").glob("*.py"))]
        raise FileNotFoundError(
            f"recipe {str(path)!r} does not exist{nearest(str(path), known) or '; see configs/.'}"
        )
    module = import_file(path)
    if not hasattr(module, "get_config"):
        raise ValueError(f"recipe {str(path)!r} has no get_config(arg); see configs/ for examples.")
    return module.get_config


def import_file(path: Path) -> Any:
    """The module that a file is. Raises ValueError for a file that is no python."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"recipe {str(path)!r} is no python file; give a file ending in .py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _split_override(override: str) -> tuple[str, str]:
    path, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} has no value; write --config.{path}=VALUE.")
    return path, value


def set_field(config: Config, path: str, text: str) -> None:
    """Sets 'a.b' to the value that `text` spells.

    Raises:
      ValueError: no such field (with the nearest name), or a value of another type.
    """
    *parents, last = path.split(".")
    section = config
    for parent in parents:
        _require_field(section, parent, path)
        section = section[parent]
        if not isinstance(section, ConfigDict):
            raise ValueError(f"config.{path} does not exist: config.{parent} has no fields.")
    if parents[-1:] == [FREE]:
        with section.unlocked():
            section[last] = _literal(text)
        return
    _require_field(section, last, path)
    with section.ignore_type():
        section[last] = _convert(text, section[last], path)


def _require_field(section: Config, name: str, path: str) -> None:
    if name not in section:
        known = list(section.keys())
        hint = nearest(name, known) or f"; its section has {', '.join(map(str, known))}."
        raise ValueError(f"config.{path} does not exist: no field {name!r}{hint}")


def _convert(text: str, old: Any, path: str) -> Any:
    value = text if isinstance(old, str) else _literal(text)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple) and not isinstance(value, tuple | list):
        value = tuple(_literal(part) for part in text.split(",") if part)
    fits = old is None or isinstance(value, tuple | list if isinstance(old, tuple) else type(old))
    if not fits or (isinstance(value, bool) and not isinstance(old, bool | None)):
        raise ValueError(
            f"config.{path} must be {type(old).__name__} like {old!r}, got {text!r}; "
            "change the value."
        )
    return tuple(value) if isinstance(value, list) else value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def to_json(config: Config) -> dict[str, Any]:
    """The config as plain dicts and lists."""
    return _plain(config.to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def from_json(fields: Mapping[str, Any]) -> Config:
    """The config that `to_json` gave."""
    return ConfigDict(fields, convert_dict=True).lock()


def model_config(config: Config) -> Any:
    """The model's config of config.model.

    Raises:
      ValueError: an unknown dtype, or fields that do not fit each other.
    """
    return _build(find_family(config.task).config, config.model)


def _build(kind: type, section: Config) -> Any:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}
    for name in DTYPES:
        if name in values:
            values[name] = _dtype(name, values[name])
    for field in dataclasses.fields(kind):
        if "section" in field.metadata:
            values[field.name] = _build(field.metadata["section"][0], section[field.name])
    return kind(**values)


def _dtype(field: str, name: str | None) -> Any:
    known = ("float32", "bfloat16", "float16")
    if name is not None and name not in known:
        raise ValueError(f"config.model.{field}={name!r} must be one of {known}; change it.")
    return None if name is None else getattr(jnp, name)
