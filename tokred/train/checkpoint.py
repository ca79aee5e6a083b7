"""The one place that knows Orbax: everything a run needs to go on, in one checkpoint a step.

Items: 'model' ({'params', 'rest', 'ema'}: arrays by path) · 'train' (arrays by path: optimizer,
controllers, rng key, step, fault) · 'data' (JSON: the place in the stream of batches) · 'about'
(JSON: format, config, stage, the reduction's schedule). The model can be read without the rest.

Arrays are global: a checkpoint does not know how many devices or processes wrote it. 'data' counts
global batches, so any number of processes that divides the batch goes on with the next one.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from tokred.nn.skeleton import Arrays, Weights, by_path
from tokred.train.state import State, result

FORMAT = 2  # rises when a checkpoint is no longer what older code expects
METRIC = "accuracy"
MODEL = ("params", "rest", "ema")
TRAIN = ("opt", "controllers", "key", "step", "fault")

# The field of the config that most likely explains a differing leaf, by part of a path.
FIELDS = {
    "controllers/": "train.method, train.options, rates.method or rates.options",
    "ema/": "optimizer.ema",
    "embed/": "model.patch, model.patch_kernel, model.channels or model.width",
    "position": "model.image_size, model.patch or model.width",
    "cls": "model.class_token or model.width",
    "registers": "model.registers",
    "reductions/": "train.method, train.options, rates.method or rates.options",
    "opt/": "optimizer, model.depth or model.width",
    "mlp/": "model.mlp_ratio or model.width",
    "head/": "model.classes or model.width",
    "blocks/": "model.depth, model.width or model.heads",
}


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Orbax warns that what is opened to be read will only be read."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.setLevel(level)


class NotWrittenError(OSError):
    """What training had to write could not be written."""


class Checkpoints:
    """Checkpoints of one working directory by global step; a context that waits for writes.

    latest: how many of the newest stay. periodic: those at multiples of so many steps stay too, 0
    for none. best: so do this many with the highest evaluated accuracy. create: whether to make
    the directory. Raises FileNotFoundError where `create` is false and nothing was trained there.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        latest: int = 1,
        periodic: int = 0,
        best: int = 0,
        create: bool = True,
    ):
        self.path = Path(workdir).absolute() / "checkpoints"
        if not create:
            _require(Path(workdir), self.path)
        handlers = ocp.handlers.create_default_handler_registry(
            model=ocp.StandardCheckpointHandler(),
            train=ocp.StandardCheckpointHandler(),
            data=ocp.JsonCheckpointHandler(),
            about=ocp.JsonCheckpointHandler(),
        )
        policy = _policy(latest, periodic, best)
        with contextlib.nullcontext() if create else _unwarned():
            how = ocp.CheckpointManagerOptions(
                preservation_policy=policy, create=create, read_only=not create
            )
            self._manager = ocp.CheckpointManager(self.path, options=how, handler_registry=handlers)
        if not create:
            self.require_step()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._guarded(self._manager.wait_until_finished)
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The last complete step; None where there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """All complete steps."""
        return sorted(self._manager.all_steps())

    def require_step(self) -> int:
        """The last complete step. Raises FileNotFoundError where there is none."""
        if self.latest is None:
            raise FileNotFoundError(
                f"{self.path} holds no complete checkpoint; train first with train.py, or give the "
                "--workdir of a finished run."
            )
        return self.latest

    def save(
        self,
        step: int,
        state: State,
        *,
        data: Mapping[str, Any],
        about: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Writes in the background; step: unique and growing over all stages of a job.

        A step that is there already is not written again. Raises OSError where this save, or the
        one before it, could not be written; the sentence names the last good step.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(_filled({k: state[k] for k in MODEL})),
            train=ocp.args.StandardSave(_raw({k: state[k] for k in TRAIN})),
            data=ocp.args.JsonSave(dict(data)),
            about=ocp.args.JsonSave({"format": FORMAT, **about}),
        )
        self._guarded(lambda: self._manager.save(step, args=items, metrics=metrics))

    def _guarded(self, write: Callable[[], Any]) -> None:
        try:
            if write() is False:
                raise ValueError("a later step is there already")
        except Exception as error:  # Orbax, TensorStore and the system raise many kinds
            raise self.not_written("a checkpoint", error) from error

    def not_written(self, what: str, error: Exception) -> "NotWrittenError":
        """The error that says what could not be written, and the last good step."""
        self._manager.reload()
        good = f"the last good step is {self.latest}" if self.latest else "no step was saved"
        return NotWrittenError(
            f"{self.path.parent}: {what} could not be written ({_first_line(error)}); {good}; free "
            "the disk or give a --workdir that can be written, then run the same command."
        )

    def about(self) -> dict[str, Any]:
        """The description at the last step.

        Raises:
          FileNotFoundError: no checkpoint. ValueError: it is damaged, another program's, or of a
            newer format.
        """
        found = self._read("about", ocp.args.JsonRestore())
        if not isinstance(found, dict) or "config" not in found:
            raise ValueError(
                f"{self.path} holds checkpoints that tokred did not write ('about' has no "
                "'config'); give the --workdir of a tokred run."
            )
        if found.get("format", 1) != FORMAT:
            raise ValueError(
                f"{self.path} holds checkpoints of format {found.get('format', 1)}, this tokred "
                f"reads format {FORMAT}; use the tokred that wrote them, or another --workdir."
            )
        return found

    def data(self) -> dict[str, Any]:
        """The place in the data at the last step. Errors as in `about`."""
        return self._read("data", ocp.args.JsonRestore())

    def model(self, target: Weights) -> Weights:
        """What training gave at the last step: averaged parameters where averages were kept.

        target: names, shapes, dtypes and shardings; may be shapes only. Raises as `state` does.
        """
        stored, parts = self._describe("model"), target._asdict()
        check_same(parts, {name: stored.get(name) for name in parts})
        ema = {name: target.params[name] for name in stored.get("ema") or {}}
        return result(self._read_arrays("model", {**parts, "ema": ema}))

    def weights(
        self, params: Arrays, mesh: jax.sharding.Mesh, optional: Callable[[str], bool]
    ) -> Arrays:
        """Parameters at the last step, those aside that are `optional` here or there and missing
        on the other side. Raises as `state` does."""
        stored = self._describe("model")
        theirs = dict(stored["params"])
        shared = {k: v for k, v in params.items() if k in theirs or not optional(k)}
        needed = {k: v for k, v in theirs.items() if k in params or not optional(k)}
        check_same({"params": shared}, {"params": needed})
        everywhere = jax.NamedSharding(mesh, jax.P())
        target = {
            part: {k: params.get(k, _shape(v, everywhere)) for k, v in (leaves or {}).items()}
            for part, leaves in stored.items()
        }
        found = self._read_arrays("model", target)
        return {k: {**found["params"], **found.get("ema", {})}[k] for k in shared}

    def state(self, target: State) -> State:
        """The state at the last step, placed like `target`, which may be shapes only.

        Raises:
          FileNotFoundError: no checkpoint. ValueError: it is damaged, or of another model or
            optimizer; the sentence names the first leaf that is missing, extra or different.
        """
        model, train = {k: target[k] for k in MODEL}, _raw({k: target[k] for k in TRAIN})
        check_same(model, self._describe("model"))
        check_same({"train": train}, {"train": self._describe("train")})
        flat = self._read_arrays("train", train)
        leaves = [flat[name] for name in by_path({k: target[k] for k in TRAIN})]
        definition = jax.tree.structure({k: target[k] for k in TRAIN})
        rest = jax.tree.unflatten(definition, leaves)
        key = jax.random.wrap_key_data(rest["key"])
        return {**self._read_arrays("model", model), **rest, "key": key}

    def _read_arrays(self, item: str, target: Any) -> Any:
        filled = {k: v for k, v in target.items() if not isinstance(v, dict) or v}
        found = self._read(item, ocp.args.StandardRestore(jax.tree.map(_shape, filled)))
        return {**{k: {} for k in target}, **found}

    def _read(self, item: str, how: Any) -> Any:
        step = self.require_step()
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**{item: how}))
        except Exception as error:  # Orbax and TensorStore raise many kinds for a broken file
            raise _damaged(self.path / str(step) / item, error) from error
        return found[item]

    def _describe(self, item: str) -> dict[str, Any]:
        step = self.require_step()
        try:
            found = self._manager.item_metadata(step)[item]
        except Exception as error:  # as in _read
            raise _damaged(self.path / str(step) / item, error) from error
        if found is None or not isinstance(getattr(found, "tree", None), Mapping):
            raise _damaged(self.path / str(step) / item, "its list of arrays is missing")
        return dict(found.tree)


def _policy(latest: int, periodic: int, best: int) -> Any:
    if latest < 1 or periodic < 0 or best < 0:
        raise ValueError(
            f"config.checkpoint: needs latest >= 1, periodic >= 0 and best >= 0, got {latest}, "
            f"{periodic} and {best}; change these fields."
        )
    kept: list[Any] = [policies.LatestN(latest)]
    if periodic:
        kept.append(policies.EveryNSteps(periodic))
    if best:
        how = {"get_metric_fn": lambda metrics: metrics[METRIC], "n": best}
        kept.append(policies.BestN(**how, keep_checkpoints_without_metrics=False))
    return policies.AnyPreservationPolicy(kept)


def _filled(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in tree.items() if part}


def _raw(tree: Mapping[str, Any]) -> dict[str, Any]:
    """By path, with the bits of keys in place of keys."""
    return {name: _bits(leaf) for name, leaf in by_path(tree).items()}


def _bits(leaf: Any) -> Any:
    if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.random.key_data(leaf)
    bits = jax.eval_shape(jax.random.key_data, leaf)
    return _shape(bits, leaf.sharding)


def _shape(x: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    place = getattr(x, "sharding", None) if sharding is None else sharding
    return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=place)


def _require(workdir: Path, path: Path) -> None:
    if not workdir.is_dir():
        raise FileNotFoundError(f"workdir {workdir} does not exist; give the --workdir of a run.")
    if not path.is_dir():
        what = "is empty" if not any(workdir.iterdir()) else "is not the directory of a tokred run"
        raise FileNotFoundError(
            f"workdir {workdir} {what} (it has no 'checkpoints'); train first with train.py, or "
            "give the --workdir of a finished run."
        )


def _first_line(error: Any) -> str:
    return str(error).strip().split("\n")[0][:160]


def _damaged(path: Path, error: Any) -> ValueError:
    return ValueError(
        f"the checkpoint {path} is damaged and cannot be read ({_first_line(error)}); delete its "
        "directory to fall back on an earlier one, or train again."
    )


def check_same(expected: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first leaf whose presence, shape or dtype differs.

    Both: {part: {path: array or its description}}.
    """
    mine, theirs = _described(expected), _described(stored)
    for name in sorted({*mine, *theirs}):
        if mine.get(name) != theirs.get(name):
            raise ValueError(
                f"the checkpoint is of another model or optimizer: {name!r} should be "
                f"{mine.get(name, 'absent')}, in the checkpoint it is {theirs.get(name, 'absent')};"
                f" look at {_field(name)} in the config."
            )


def _described(parts: Mapping[str, Any]) -> dict[str, str]:
    return {
        name if part in ("params", "rest", "train") else f"{part}/{name}": (
            f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for part, leaves in parts.items()
        for name, leaf in (leaves or {}).items()
    }


def _field(name: str) -> str:
    return next((field for part, field in FIELDS.items() if part in name), "the fields of model")
