"""The weights that a run starts from: fresh ones, another run's, or an exported model's."""

from pathlib import Path

from tokred.interop import Source, is_exported
from tokred.nn.skeleton import Arrays, Weights
from tokred.train.checkpoint import Checkpoints
from tokred.train.config import Config
from tokred.train.setup import Setup


def starting_weights(setup: Setup) -> Weights:
    """Fresh weights, or those of config.start_from, then of config.start_parts, with fresh
    reductions: the workdir of a finished run, or a directory with model.safetensors and
    config.json.

    Raises:
      ValueError: weights of another model, or of one whose attention has another softmax.
      FileNotFoundError: neither is there.
    """
    fresh, config = setup.init(), setup.config
    params = dict(fresh.params)
    for part, start in {"": config.start_from, **config.start_parts}.items():
        if start:
            own = part and f"{part}/"
            wanted = {k.removeprefix(own): v for k, v in params.items() if k.startswith(own)}
            read = _exported if is_exported(start) else _finished
            params |= {own + k: v for k, v in read(setup, part, start, wanted).items()}
    return Weights(params, fresh.rest)


def _finished(setup: Setup, part: str, start: str, params: Arrays) -> Arrays:
    with Checkpoints(start, create=False) as checkpoints:
        stored = checkpoints.about()["config"]
        if not part:
            _require_same_softmax(setup.config, stored["model"].get("sink"))
        return checkpoints.weights(params, setup.mesh, _is_own if part else _is_reduction)


def _exported(setup: Setup, part: str, start: str, params: Arrays) -> Arrays:
    source, model = Source(Path(start)), setup.model
    if "use_softmax1" in source.settings:  # plain T5 does not say: MrT5 goes on from it with either
        _require_same_softmax(setup.config, bool(source.settings["use_softmax1"]))
    own = _is_own if part else _is_reduction
    wanted = {name: array for name, array in params.items() if not own(name)}
    return source.read(getattr(model, part) if part else model, wanted)


def _is_reduction(name: str) -> bool:
    return "reductions/" in name


def _is_own(name: str) -> bool:
    """What a model has for itself and lacks as a part of another."""
    return _is_reduction(name) or name.startswith("head/")


def _require_same_softmax(config: Config, theirs: bool | None) -> None:
    """No parameter tells them apart."""
    mine = config.model.get("sink")
    if mine != theirs:
        raise ValueError(
            f"config.start_from={str(config.start_from)!r} was trained with model.sink={theirs}, "
            f"this config has config.model.sink={mine}; give both the same softmax."
        )
