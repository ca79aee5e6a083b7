"""Models that exist, with reductions attached: read, changed, written."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokred.interop.attach import attached, find_plan
from tokred.interop.families import Source
from tokred.interop.gguf import open_source
from tokred.interop.safetensors import open_file, write_params
from tokred.interop.vision import sides
from tokred.nn.skeleton import split_model
from tokred.plan import Plan, Reduction, nearest

DENSE = Plan()
REDUCTION, LEARNED = "reduction.json", "reductions.safetensors"
BESIDE = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*processor*.json",
          "generation_config.json", "chat_template*", "*.index.json")  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A model and the plan that it runs under. method, options: what the plan was made of, '' for
    one made by hand. origin: None for a model that was not read."""

    model: Any
    plan: Plan = DENSE
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    origin: Source | None = None

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        """What the model gives for these inputs under the plan."""
        return self.model(*inputs, plan=self.plan, **more)


def load(
    directory: str | Path,
    plan: Plan | str | None = None,
    *,
    family: str | None = None,
    sharding: Callable[[str, tuple[int, ...]], Any] | None = None,
    seed: int = 0,
    **changes: Any,
) -> Loaded:
    """The model in a directory of safetensors and config.json, under Hugging Face's names, or in a
    GGUF file.

    plan: to run it under, or a method's name; None for what reduction.json there says, if it is
    there. family: of `FAMILIES`, None for what config.json says. sharding: of a parameter by its
    path and shape. seed: of modules that the plan learns. changes: fields of the model's config,
    such as image_size (positions are resized as torch does), dtype, param_dtype, attention. Arrays
    are placed one by one.

    Raises:
      FileNotFoundError: no weights or no config.json. ImportError: safetensors is not installed.
      ValueError: pickles, files that are cut off, an unknown family, settings that are not
        supported, names that are missing or unexpected, NaN, or a plan that does not fit.
    """
    source = open_source(directory, family)
    config = changed(source.config, changes)
    model = nnx.eval_shape(lambda: source.family.model(config, rngs=nnx.Rngs(0)))
    skeleton, shapes = split_model(model)
    wanted = {path: _wanted(path, shape, sharding) for path, shape in shapes.params.items()}
    loaded = Loaded(skeleton.merge(source.read(config, wanted), shapes.rest), origin=source)
    if plan is None and (source.directory / REDUCTION).is_file():
        return _reattached(loaded, source.directory)
    return loaded if plan is None else attach(loaded, plan, seed=seed)


def attach(
    model: Any,
    reduction: Plan | Reduction | str,
    *,
    layers: Sequence[int] | None = None,
    site: str = "mid",
    seed: int = 0,
    **options: Any,
) -> Loaded:
    """The same weights under another plan.

    model: any model, or a `Loaded`. reduction: a method's name with its options, a Plan, or one
    Reduction, which acts at `site` of each of `layers`. layers: of a method, where it takes them.
    seed: of modules that the plan learns; all others are the model's own, not copies.

    Raises:
      ValueError: an unknown method or option, or a plan that the model cannot host.
    """
    loaded = model if isinstance(model, Loaded) else Loaded(model)
    plan, given = find_plan(loaded.model, reduction, layers, site, options)
    return dataclasses.replace(
        loaded,
        model=attached(loaded.model, plan, seed),
        plan=plan,
        method=reduction if isinstance(reduction, str) else "",
        options=given,
    )


def save(loaded: Loaded, directory: str | Path) -> Path:
    """Writes what `load` reads: the same files with the model's weights, in the types that they
    had, and beside them reduction.json (method, options, counts per layer, every step with its
    numbers) and reductions.safetensors (what the plan has learned).

    Raises:
      ValueError: a model that was not read from files, or the directory that it was read from.
    """
    origin, directory = loaded.origin, Path(directory)
    if origin is None or directory.resolve() == origin.directory.resolve():
        raise ValueError(
            f"save: {directory} must be another directory than the one that the model was read "
            "from, and it must have been read from one; use load, and another directory."
        )
    directory.mkdir(parents=True, exist_ok=True)
    params = split_model(loaded.model)[1].params
    found = origin.found(loaded.model.config)
    for file, names in origin.shards.items():
        own = [each for each in found if each.name in names]
        write_params(directory / file, origin.tensor, own, params, origin.metadata(file))
    settings = json.dumps(_resized(origin.settings, loaded.model.config), indent=2)
    (directory / "config.json").write_text(settings + "\n")
    for path in {p for pattern in BESIDE for p in origin.directory.glob(pattern)}:
        shutil.copy(path, directory)
    if loaded.plan.steps:
        _save_plan(loaded, directory, params)
    return directory


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The config, or those of the parts that have such a field, with these changes. Raises
    ValueError for a field that none has."""
    for name, value in changes.items():
        new = _change(config, name, value)
        if new is None:
            fields = [f.name for f in dataclasses.fields(config)]
            raise ValueError(
                f"{type(config).__name__} has no field {name!r}{nearest(name, fields)}"
            )
        config = new
    return config


def _change(config: Any, name: str, value: Any) -> Any:
    fields = [f.name for f in dataclasses.fields(config)]
    if name in fields:
        return dataclasses.replace(config, **{name: value})
    parts = {f: getattr(config, f) for f in fields}
    parts = {f: _change(p, name, value) for f, p in parts.items() if dataclasses.is_dataclass(p)}
    parts = {f: p for f, p in parts.items() if p is not None}
    return dataclasses.replace(config, **parts) if parts else None


def _wanted(path: str, shape: Any, sharding: Callable[..., Any] | None) -> Any:
    where = None if sharding is None else sharding(path, shape.shape)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def _resized(settings: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """config.json with the images' size that the positions have now."""
    vision = getattr(config, "vision", config)
    part = settings.get("vision_config", settings)
    size = getattr(vision, "image_size", None)
    if size is None or sides(part, "image_size") == size:
        return dict(settings)
    new = {**part, "image_size": size[0] if size[0] == size[1] else list(size)}
    return {**settings, "vision_config": new} if "vision_config" in settings else new


def _save_plan(loaded: Loaded, directory: Path, params: Mapping[str, Any]) -> None:
    from safetensors.numpy import save_file

    learned = {name: array for name, array in params.items() if "reductions/" in name}
    if learned:
        contiguous = {n: np.ascontiguousarray(a) for n, a in learned.items()}
        save_file(contiguous, directory / LEARNED)
    steps = [
        {"site": site.name, "reduction": type(r).__name__, **dataclasses.asdict(r)}
        for site, r in loaded.plan.steps
    ]
    counts = [row._asdict() for row in loaded.plan.counts(loaded.model.config.layout)]
    about = {"method": loaded.method, "options": dict(loaded.options), "twin": loaded.plan.twin}
    text = json.dumps({**about, "counts": counts, "steps": steps}, indent=1, default=str)
    (directory / REDUCTION).write_text(text + "\n")


def _reattached(loaded: Loaded, directory: Path) -> Loaded:
    about = json.loads((directory / REDUCTION).read_text())
    if not about["method"]:
        raise ValueError(
            f"{directory / REDUCTION} tells of a plan made by hand, {about['steps'][0]['site']} "
            "and on; pass it as plan=."
        )
    options: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in about["options"].items()
    }
    whole = attach(loaded, about["method"], **options)
    whole = dataclasses.replace(whole, plan=whole.plan.with_twin(about["twin"]))
    skeleton, weights = split_model(whole.model)
    own = [name for name in weights.params if "reductions/" in name]
    if not own:
        return whole
    with open_file(directory / LEARNED) as file:
        params = {name: jnp.asarray(file.get_tensor(name)) for name in own}
    model = skeleton.merge({**weights.params, **params}, weights.rest)
    return dataclasses.replace(whole, model=model)
