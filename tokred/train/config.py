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
DATA = {"images": IMAGES, "text": TEXT | {FREE: {}}, "seq2seq": PAIRS | {FREE: {}}}
Config = Any  # a locked ConfigDict; type checkers cannot know its fields
BASELINES = ("tome", "evit", "topk", "uniform", "pooling", "random")


def default_config(task: str = "images") -> Config:
    """Every field of a job with its default; locked, so that recipes cannot misspell one.

    task: 'images' (a ViT that classifies), 'text' (a decoder that predicts the next token) or
    'seq2seq' (an encoder-decoder on bytes).

    seed: of weights, order of data and draws. start_from: the workdir of a finished run whose
    weights to start from. mesh: see `mesh.make_mesh`; rules go before `mesh.RULES`. model: fields
    of the task's model. data: see `inputs`; mock: number of
    made-up examples instead of real ones, 0 for none. train: the
    first stage, under a method with its options (a learned method in its soft form); 0 steps for
    none; remat: see `Call`. optimizer: see `make_optimizer`; ema, accumulate: see
    `make_train_step`. loss: mixup to mix_switch are the fields of `Mixing`. distill: of the first
    stage, from the dense model in another workdir; see `Teacher`. rates: a second stage that trains
    the rates of a method alone, 0 steps for none. finetune: of every evaluated row. evaluate.macs:
    the budget where nothing is learned, as a share of the dense model. checkpoint: see
    `Checkpoints`; a checkpoint every so many steps, an evaluation before each if best > 0.
    """
    optimizer = {"warmup": 0.1, "schedule": "cosine", "end": 0.0, "b1": 0.9, "b2": 0.99}
    optimizer |= {"clip": 1.0, "layer_decay": 1.0, "ema": 0.0, "accumulate": 1}
    mixing = {"mixup": 0.0, "cutmix": 0.0, "mix_share": 1.0, "mix_switch": 0.5}
    config: Config = ConfigDict(
        {
            "task": task,
            "seed": 0,
            "start_from": None,
            "mesh": {"shape": (-1,), "axes": ("data",), "rules": ()},
            "model": _model_defaults(task),
            "data": {
                **DATA[task],
                "data_dir": None,
                "threads": 1,
                "mock": 0,
            },
            "train": {"steps": 1000, "method": "dense", "options": {}, "remat": 0},
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
    fields = dataclasses.fields(find_family(task).config)
    return {f.name: f.default for f in fields} | {"dtype": None, "param_dtype": "float32"}


def bytes_config() -> Config:
    """What the recipes on bytes share: a small decoder on the Python standard library's sources."""
    config = default_config("text")
    config.model.update({"vocab": 259, "width": 64, "depth": 8, "heads": 4, "context": 256})
    config.data.update({"name": "stdlib", "length": 256, "batch": 8})
    config.train.steps = 1000
    config.optimizer.update({"lr": 2e-3, "weight_decay": 0.1, "warmup": 0.05, "end": 0.1})
    config.log.every = 50
    return config


def span_config() -> Config:
    """What the recipes on corrupted bytes share: a small encoder-decoder on the same sources."""
    config = default_config("seq2seq")
    config.model.update({"width": 96, "depth": 4, "decoder_depth": 2, "heads": 3, "head_dim": 32})
    config.model.update({"hidden": 256, "context": 128, "target_context": 80, "sink": True})
    config.data.options = {"mean_span": 3.0, "density": 0.3}
    config.data.update({"length": 128, "batch": 32, "eval_batch": 32, "eval_rows": 1024})
    config.train.steps = 1500
    config.optimizer.update({"lr": 2e-3, "weight_decay": 0.1, "warmup": 0.05, "end": 0.1})
    return config


def continued_config() -> Config:
    """What the recipes that go on from a model of `span_config` share; set start_from."""
    config = span_config()
    config.train.steps = 500
    config.optimizer.update({"lr": 5e-4, "schedule": "linear", "warmup": 0.0, "end": 0.0})
    config.log.every = 25
    return config


def digits_config() -> Config:
    """What the digits recipes share: the model, and dense training of it for 3200 steps."""
    config = default_config()
    config.model.update({"image_size": (16, 16), "patch": (2, 2), "patch_kernel": 6})
    config.model.update({"channels": 1, "classes": 10, "position": "learned_sincos"})
    config.model.update({"width": 64, "depth": 4, "heads": 4, "mlp_ratio": 2.0})
    config.data.update({"name": "digits", "batch": 32, "shift": 1, "placements": 4})
    config.train.steps = 3200
    config.optimizer.update({"lr": 2e-3, "weight_decay": 0.2})
    config.loss.label_smoothing = 0.1
    return config


def imagenet_config(batch: int) -> Config:
    """What the ImageNet recipes share: ViT-S/16, and how DeiT-S is trained on images."""
    config = default_config()
    config.model.update({"width": 384, "depth": 12, "heads": 6, "drop_path": 0.1})
    config.model.dtype = "bfloat16"
    config.data.update({"name": "imagenet2012", "batch": batch, "eval_batch": 1024, "threads": 16})
    config.optimizer.update({"b2": 0.999, "clip": 0.0})
    config.loss.update({"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0})
    return config


def deit_config(batch: int, images: int, epochs: int) -> Config:
    """What the ImageNet recipes from scratch share: DeiT-S's schedule and averages."""
    config = imagenet_config(batch)
    config.train.steps = images * epochs // batch
    config.optimizer.update({"lr": 5e-4 * batch / 512, "end": 0.01, "warmup": 5 / epochs})
    config.optimizer.update({"weight_decay": 0.05, "ema": 0.99996})
    config.checkpoint.every = 5000
    return config


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
        if small.start_from is not None:  # the other run does not exist at smoke size
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
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"recipe {str(path)!r} is no python file; give a file ending in .py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"recipe {str(path)!r} has no get_config(arg); see configs/ for examples.")
    return module.get_config


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
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in config.model.items()
    }
    for name in DTYPES:
        fields[name] = _dtype(name, fields[name])
    return find_family(config.task).config(**fields)


def _dtype(field: str, name: str | None) -> Any:
    known = ("float32", "bfloat16", "float16")
    if name is not None and name not in known:
        raise ValueError(f"config.model.{field}={name!r} must be one of {known}; change it.")
    return None if name is None else getattr(jnp, name)
