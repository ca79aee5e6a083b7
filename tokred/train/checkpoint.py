"""The one place that knows Orbax: arrays of the model, state of the optimizer, and a description.

A checkpoint holds 'model' ({'params', 'rest'}: arrays by path), 'train' ({'opt', 'step'}) and
'about' (JSON: the whole config, how far the job has come, what it learned). The model can be read
without the rest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from tokred.train.state import Arrays, State

# The field of the model's config that most likely explains a differing shape, by part of a path.
FIELDS = {
    "embed/": "model.patch, model.patch_kernel, model.channels or model.width",
    "position": "model.image_size, model.patch or model.width",
    "cls": "model.class_token or model.width",
    "registers": "model.registers",
    "reductions/": "plan or rates",
    "mlp/": "model.mlp_ratio or model.width",
    "head/": "model.classes or model.width",
    "blocks/": "model.depth, model.width or model.heads",
}


class Checkpoints:
    """Checkpoints of one working directory by global step; a context that waits for writes.

    keep: how many of the latest stay. create: whether to make the directory.
    Raises FileNotFoundError where `create` is false and nothing was trained there.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 1, create: bool = True):
        self.path = Path(workdir).absolute() / "checkpoints"
        if not create:
            _require(Path(workdir), self.path)
        self._manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep), create=create
            ),
            handler_registry=ocp.handlers.create_default_handler_registry(
                model=ocp.StandardCheckpointHandler(),
                train=ocp.StandardCheckpointHandler(),
                about=ocp.JsonCheckpointHandler(),
            ),
        )
        if not create:
            self.require_step()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The last complete step; None where there is none."""
        return self._manager.latest_step()

    def require_step(self) -> int:
        """The last complete step. Raises FileNotFoundError where there is none."""
        if self.latest is None:
            raise FileNotFoundError(
                f"{self.path} holds no complete checkpoint; train first with train.py, or give the "
                "--workdir of a finished run."
            )
        return self.latest

    def save(self, step: int, state: State, about: Mapping[str, Any]) -> None:
        """Writes in the background; step: unique and growing over all stages of a job."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave({k: state[k] for k in ("params", "rest")}),
                train=ocp.args.StandardSave({k: state[k] for k in ("opt", "step")}),
                about=ocp.args.JsonSave(dict(about)),
            ),
        )

    def about(self) -> dict[str, Any]:
        """The description at the last step.

        Raises:
          FileNotFoundError: no checkpoint. ValueError: it is damaged, or another program's.
        """
        found = self._read("about", ocp.args.JsonRestore())
        if not isinstance(found, dict) or "config" not in found:
            raise ValueError(
                f"{self.path} holds checkpoints that tokred did not write ('about' has no "
                "'config'); give the --workdir of a tokred run."
            )
        return found

    def model(self, params: Arrays, rest: Arrays) -> tuple[Arrays, Arrays]:
        """Arrays at the last step; the arguments give names, shapes, dtypes and shardings.

        Raises:
          FileNotFoundError: no checkpoint. ValueError: it is damaged, or of another model; the
            sentence names the first leaf that differs.
        """
        target = {"params": params, "rest": rest}
        stored = self._describe("model")
        for part, arrays in target.items():
            check_same(arrays, stored.get(part) or {})
        found = self._read("model", ocp.args.StandardRestore(_abstract(target)))
        return found["params"], found["rest"]

    def train(self, opt: Any) -> dict[str, Any]:
        """{'opt', 'step'} at the last step, with the structure of `opt`. Errors as in `about`."""
        target = _abstract({"opt": opt, "step": jnp.zeros((), jnp.int32)})
        return self._read("train", ocp.args.StandardRestore(target))

    def _read(self, item: str, how: Any) -> Any:
        step = self.require_step()
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**{item: how}))
        except Exception as error:  # Orbax and TensorStore raise many kinds for a broken file
            raise _damaged(self.path / str(step) / item, error) from error
        return found[item]

    def _describe(self, item: str) -> Mapping[str, Any]:
        step = self.require_step()
        try:
            found = self._manager.item_metadata(step)[item]
        except Exception as error:  # as in _read
            raise _damaged(self.path / str(step) / item, error) from error
        if found is None or not isinstance(getattr(found, "tree", None), Mapping):
            raise _damaged(self.path / str(step) / item, "its list of arrays is missing")
        return found.tree


def _require(workdir: Path, path: Path) -> None:
    if not workdir.is_dir():
        raise FileNotFoundError(f"workdir {workdir} does not exist; give the --workdir of a run.")
    if not path.is_dir():
        what = "is empty" if not any(workdir.iterdir()) else "is not the directory of a tokred run"
        raise FileNotFoundError(
            f"workdir {workdir} {what} (it has no 'checkpoints'); train first with train.py, or "
            "give the --workdir of a finished run."
        )


def _damaged(path: Path, error: Any) -> ValueError:
    detail = str(error).strip().split("\n")[0][:160]
    return ValueError(
        f"the checkpoint {path} is damaged and cannot be read ({detail}); delete its directory to "
        "fall back on an earlier one, or train again."
    )


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )


def check_same(expected: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first leaf whose presence or shape differs."""
    for name in sorted({*expected, *stored}):
        wanted, found = (
            tuple(side[name].shape) if name in side else None for side in (expected, stored)
        )
        if wanted != found:
            raise ValueError(
                f"the checkpoint is of another model: {name!r} should have shape "
                f"{wanted or 'none'}, the checkpoint has {found or 'none'}; look at {_field(name)} "
                "in the config."
            )


def _field(name: str) -> str:
    return next((field for part, field in FIELDS.items() if part in name), "the fields of model")
