"""One stage of training: a plan, an objective, what trains, and for how long."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from tokred.data.pipeline import Batches
from tokred.train.inputs import check_batch
from tokred.train.log import Progress, RunLog
from tokred.train.losses import Objective
from tokred.train.state import Arrays, Skeleton, State, init_state, make_optimizer, select_names
from tokred.train.step import make_train_step

Save = Callable[[State, Batches], None]


@dataclass(frozen=True)
class Stage:
    """trainable: a regular expression over paths. optimizer: arguments of `make_optimizer`."""

    name: str
    objective: Objective
    steps: int
    trainable: str
    optimizer: Mapping[str, Any] = field(hash=False)

    def names(self, params: Arrays) -> tuple[str, ...]:
        return select_names(params, self.trainable)

    def make_optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(steps=self.steps, **self.optimizer)

    def init(self, params: Arrays, rest: Arrays) -> State:
        """The state at the stage's step 0."""
        return init_state(params, rest, self.make_optimizer(), self.names(params))


def run_stage(
    stage: Stage,
    skeleton: Skeleton,
    state: State,
    batches: Batches,
    *,
    key: PRNGKeyArray,
    log: RunLog | None = None,
    every: int = 50,
    save: Save | None = None,
    save_every: int = 1000,
    progress: bool = True,
) -> State:
    """Trains from state['step'] to the end of the stage; consumes `state`.

    every: steps between log lines. save: called every `save_every` steps and at the end.

    Raises:
      ValueError: images or a loss that are not finite.
    """
    step_of = make_train_step(
        skeleton, stage.objective, stage.make_optimizer(), stage.names(state["params"])
    )
    start, bar = int(state["step"]), None
    for step in range(start + 1, stage.steps + 1):
        batch = check_batch(next(batches))
        bar = bar or Progress(stage.name, start, stage.steps, len(batch["label"]), show=progress)
        state, metrics = step_of(state, batch, key)
        bar.advance()
        last = step == stage.steps
        if step % every == 0 or last:
            numbers = bar.tell(step, read_metrics(metrics, stage.name, step))
            if log is not None:
                log.write(stage.name, step, numbers)
        if save is not None and (step % save_every == 0 or last):
            save(state, batches)
    if bar is not None:
        bar.close()
    return state


def read_metrics(metrics: Mapping[str, Any], stage: str, step: int) -> dict[str, float]:
    """As floats. Raises ValueError where the loss is not finite."""
    numbers = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    if not np.isfinite(numbers["loss"]):
        raise ValueError(
            f"stage {stage!r}: the loss is {numbers['loss']} at step {step}; lower "
            "config.optimizer.lr or check the data."
        )
    return numbers
