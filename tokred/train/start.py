"""The weights that a run starts from: fresh ones, another run's, or an exported model's."""

from collections.abc import Mapping
from typing import Any

from tokred.interop import T5, is_exported, read_params, read_settings
from tokred.train.checkpoint import Checkpoints
from tokred.train.config import Config
from tokred.train.setup import Setup
from tokred.train.state import Arrays, Weights

EXPORTED = {"seq2seq": T5}  # rules by task


def starting_weights(setup: Setup) -> Weights:
    """Fresh weights, or those of config.start_from with fresh reductions: the workdir of a finished
    run, or a directory with model.safetensors and config.json.

    Raises:
      ValueError: weights of another model, or of one whose attention has another softmax.
      FileNotFoundError: neither is there.
    """
    fresh, start = setup.init(), setup.config.start_from
    if start is None:
        return fresh
    if is_exported(start):
        return Weights({**fresh.params, **_exported(setup)}, fresh.rest)
    with Checkpoints(start, create=False) as checkpoints:
        stored = checkpoints.about()["config"]
        _require_same_softmax(setup.config, stored["model"].get("sink"))
        found = checkpoints.weights(fresh.params, setup.mesh, _is_reduction)
    return Weights({**fresh.params, **found}, fresh.rest)


def _exported(setup: Setup) -> Arrays:
    config = setup.config
    if config.task not in EXPORTED:
        raise ValueError(
            f"config.start_from={str(config.start_from)!r} holds exported weights, which models of "
            f"config.task={config.task!r} cannot read; use one of {list(EXPORTED)}."
        )
    settings: Mapping[str, Any] = read_settings(config.start_from)
    if "use_softmax1" in settings:  # plain T5 does not say: MrT5 goes on from it with either
        _require_same_softmax(config, bool(settings["use_softmax1"]))
    params = setup.shapes.params
    wanted = {name: shape for name, shape in params.items() if not _is_reduction(name)}
    return read_params(config.start_from, EXPORTED[config.task], wanted)


def _is_reduction(name: str) -> bool:
    return name.startswith("reductions/")


def _require_same_softmax(config: Config, theirs: bool | None) -> None:
    """No parameter tells them apart."""
    mine = config.model.get("sink")
    if mine != theirs:
        raise ValueError(
            f"config.start_from={str(config.start_from)!r} was trained with model.sink={theirs}, "
            f"this config has config.model.sink={mine}; give both the same softmax."
        )
