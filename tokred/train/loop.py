"""One stage of training: a plan, an objective, what trains, and for how long."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from tokred.data.pipeline import Batches
from tokred.nn.skeleton import Arrays, Skeleton, Weights
from tokred.train.clock import Clock, Tracer
from tokred.train.guards import Watch, read_metrics
from tokred.train.log import Progress, RunLog
from tokred.train.losses import Objective
from tokred.train.mesh import (
    RULES,
    Rules,
    batch_sharding,
    place_by_rules,
    replicated,
    to_mesh,
)
from tokred.train.optimizer import make_optimizer
from tokred.train.processes import Preempted
from tokred.train.state import State, init_state, select_names
from tokred.train.step import Metrics, TrainStep, make_train_step

Place = dict[str, Any]
Save = Callable[[State, Place], None]


@dataclass(frozen=True)
class Stage:
    """trainable: a regular expression over paths. optimizer: arguments of `make_optimizer`."""

    name: str
    objective: Objective
    steps: int
    trainable: str
    optimizer: Mapping[str, Any] = field(hash=False)
    accumulate: int = 1
    ema: float = 0.0

    def names(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        return select_names(params, self.trainable)

    def make_optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(steps=self.steps, **self.optimizer)

    def init(self, weights: Weights, key: PRNGKeyArray) -> State:
        """The state at the stage's step 0; pure."""
        for pattern, _ in self.optimizer.get("scales", ()):
            select_names(weights.params, pattern, "config.optimizer.scales")
        return init_state(
            weights,
            self.make_optimizer(),
            self.names(weights.params),
            key=key,
            controllers=self.objective.plan.init(),
            ema=bool(self.ema),
        )

    def make_step(self, skeleton: Skeleton, state: State, mesh: Mesh, rules: Rules) -> TrainStep:
        """The compiled step for states placed like `state` (or its shapes) on the mesh."""
        shardings = place_by_rules(state, mesh, rules), batch_sharding(mesh), replicated(mesh)
        return make_train_step(
            skeleton,
            self.objective,
            self.make_optimizer(),
            self.names(state["params"]),
            accumulate=self.accumulate,
            ema=self.ema,
            shardings=shardings,
        )


@dataclass(frozen=True)
class Around:
    """What happens around the steps of a stage.

    every: steps between log lines. save(state, place in the data): called every `save_every` steps
    and at the end. stop(step): whether to save and leave with `Preempted`. trace: of the device.
    """

    log: RunLog = field(default_factory=RunLog.silent)
    every: int = 50
    save: Save = lambda state, place: None
    save_every: int = 1000
    stop: Callable[[int], bool] = lambda step: False
    progress: bool = True
    trace: Tracer = field(default_factory=lambda: Tracer(None))
    clock: Clock = field(default_factory=Clock)


class _Turn:
    """The two halves of a step that the host does: what it feeds, and what it hears."""

    def __init__(self, stage: Stage, start: int, batches: Batches, mesh: Mesh, around: Around):
        self.stage, self.start, self.batches, self.mesh = stage, start, batches, mesh
        self.around, self.clock = around, around.clock
        self.watch = Watch(stage.name, start)
        self.bar: Progress | None = None
        self.told: dict[str, Any] = {}

    def busy(self) -> bool:
        """Whether the device is still at the last step."""
        return bool(self.told) and not self.told["loss"].is_ready()

    def feed(self, step: int) -> dict[str, Array]:
        with self.clock("data", self.busy):
            batch = dict(next(self.batches))
            self.watch.saw(step, batch["id"], self.batches.get_state())
        with self.clock("place", self.busy):
            fields = self.stage.objective.fields
            rows = to_mesh({name: batch[name] for name in fields}, self.mesh)
        if self.bar is None:
            size, show = len(rows[fields[0]]), self.around.progress
            self.bar = Progress(self.stage.name, self.start, self.stage.steps, size, show=show)
        self.bar.advance()
        return rows

    def hear(self, step: int, state: State, metrics: Metrics) -> None:
        """Logs and saves where it is time to, and only then waits for the device."""
        around, last, self.told = self.around, step == self.stage.steps, metrics
        stop = around.stop(step) and not last
        tell = last or step % around.every == 0
        save = last or stop or step % around.save_every == 0
        if not (tell or save):
            return
        with self.clock("step"):
            numbers, fault = read_metrics(metrics)
        if fault:
            raise self._broken(step, state, fault)
        self.watch.passed(step)
        if tell:
            with self.clock("log"):
                self._tell(step, numbers)
        if save:
            with self.clock("save"):
                around.save(state, self.watch.place(step))
        if stop:
            raise Preempted(step)

    def _tell(self, step: int, numbers: dict[str, float]) -> None:
        rate = 0.0 if self.bar is None else self.bar.tell(step, numbers)
        self.around.log.write(self.stage.name, step, numbers, examples_per_s=rate)

    def _broken(self, step: int, state: State, fault: int) -> Exception:
        good = int(jax.device_get(state["step"]))
        if good > self.start:
            with jax.transfer_guard("allow"):
                sound = {**state, "fault": jnp.zeros_like(state["fault"])}
            self.around.save(sound, self.watch.place(good))
        return self.watch.error(fault, good, step)

    def close(self) -> None:
        self.around.trace.close()
        if self.bar is not None:
            self.bar.close()
        if self.clock.compiled:
            warnings.warn(
                f"stage {self.stage.name!r} compiled {self.clock.compiled} times after its first "
                "step; give all batches one shape.",
                stacklevel=3,
            )


def run_stage(
    stage: Stage,
    skeleton: Skeleton,
    state: State,
    batches: Batches,
    *,
    mesh: Mesh,
    rules: Rules = RULES,
    frozen: Mapping[str, Arrays] | None = None,
    around: Around | None = None,
) -> State:
    """Trains from state['step'] to the end of the stage; consumes `state`.

    frozen: arrays of the objective's teacher. Within the loop arrays move between host and device
    only where this module says so.

    Raises:
      NotFiniteError: inputs, loss or gradient norm are not finite; the last good state is saved.
      Preempted: `around.stop` said so; the state is saved.
    """
    around, start = around or Around(), int(state["step"])
    step_of = stage.make_step(skeleton, state, mesh, rules)
    turn = _Turn(stage, start, batches, mesh, around)
    try:
        with around.clock.counting(), jax.transfer_guard("disallow"), jax.set_mesh(mesh):
            for step in range(start + 1, stage.steps + 1):
                around.trace(step - start - 1)
                rows = turn.feed(step)
                with around.clock("step"):
                    state, metrics = step_of(state, rows, frozen or {})
                turn.hear(step, state, metrics)
                around.clock.turn()
    finally:
        turn.close()
    return state
