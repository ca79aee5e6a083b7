"""The one training step and the one evaluation step: pure, jitted, over flat dicts of arrays."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from tokred.nn.skeleton import Arrays, Skeleton, Weights
from tokred.plan import Layout, Plan
from tokred.report import Call, Report
from tokred.train.losses import Objective
from tokred.train.optimizer import ema_decay, update_ema
from tokred.train.state import State

Batch = Mapping[str, Any]  # arrays of numpy or of JAX
Metrics = dict[str, Array]
TrainStep = Callable[..., tuple[State, Metrics]]
Gradients = tuple[Arrays, tuple[Metrics, Any]]

FAULTS = ("the loss", "the gradient norm", "the images")  # bits of state['fault']


def make_train_step(
    skeleton: Skeleton,
    objective: Objective,
    tx: optax.GradientTransformation,
    trainable: Sequence[str],
    *,
    accumulate: int = 1,
    ema: float = 0.0,
    shardings: tuple[Any, Any, Any] | None = None,
) -> TrainStep:
    """(state, batch, frozen) -> (state, metrics); the given state is consumed.

    batch: the objective's `fields`. frozen: {'params', 'rest'} of the objective's teacher,
    {} without one. Draws come from state['key'] and state['step'], so a resumed run draws what an
    uninterrupted one draws. Gradients exist for `trainable` alone.

    From the first step whose images, loss or gradient norm are not finite, the state stays as it
    was before, but for 'fault': see `FAULTS`.

    accumulate: into how many parts the batch goes, one after another. ema: decay of the averages,
    0 for none. shardings: of (state, batch, metrics).
    """

    def train_step(state: State, batch: Batch, frozen: Any) -> tuple[State, Metrics]:
        learned = {name: state["params"][name] for name in trainable}

        def gradients_of(batch: Batch, key: PRNGKeyArray, controllers: Any) -> Gradients:
            def loss(learned: Arrays, alone: Objective) -> tuple[Array, tuple[Metrics, Any]]:
                model = skeleton.merge({**state["params"], **learned}, state["rest"])
                return alone(model, batch, key, controllers, frozen)

            return _gradients(loss, objective, learned, key, state["step"])

        key = jax.random.fold_in(state["key"], state["step"])
        gradients, (metrics, controllers) = in_parts(
            gradients_of, batch, key, state["controllers"], accumulate
        )
        norm = optax.tree.norm(gradients)
        updates, opt = tx.update(gradients, state["opt"], learned)
        fresh: Any = optax.apply_updates(learned, updates)
        decay = ema_decay(ema, state["step"])
        fault = state["fault"] | find_faults(metrics["loss"], norm, objective.finite(batch))
        new = {
            "params": {**state["params"], **fresh},
            "ema": update_ema(state["ema"], fresh, decay) if state["ema"] else {},
            "opt": opt,
            "controllers": controllers,
            "step": state["step"] + 1,
        }
        old = {name: state[name] for name in new}
        kept = jax.tree.map(lambda a, b: jnp.where(fault == 0, a, b), new, old)
        return {**state, **kept, "fault": fault}, {**metrics, "gradient_norm": norm, "fault": fault}

    if shardings is None:
        return jax.jit(train_step, donate_argnums=0)
    state, batch, everywhere = shardings
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state, batch, None),
        out_shardings=(state, everywhere),
    )


def _gradients(
    loss: Callable[..., Any], objective: Objective, learned: Arrays, key: PRNGKeyArray, step: Array
) -> Gradients:
    """Of loss(learned, objective), under the plan whose turn it is.

    Each plan has its own gradient: one through the choice would write what every plan remembers
    for it, zeros where it did not run.
    """
    if objective.varied is None:
        return jax.grad(loss, has_aux=True)(learned, objective)

    def under(plan: Plan) -> Gradients:
        alone = dataclasses.replace(objective, plan=plan, varied=None)
        return jax.grad(loss, has_aux=True)(learned, alone)

    return objective.varied(under, key, step)


def find_faults(loss: Array, norm: Array, fed: Array) -> Int[Array, ""]:
    """A bit of `FAULTS` for each that is not finite; fed: whether the batch is."""
    bad = jnp.stack([~jnp.isfinite(loss), ~jnp.isfinite(norm), ~fed])
    return (bad * 2 ** jnp.arange(len(FAULTS))).sum().astype(jnp.int32)


def in_parts(
    f: Callable[..., Gradients], batch: Batch, key: PRNGKeyArray, controllers: Any, parts: int
) -> Gradients:
    """f(batch, key, controllers) with gradients and metrics averaged over parts of the batch.

    Part i holds the rows i, i + parts, ...: so every device splits its own rows.
    """
    if parts == 1:
        return f(batch, key, controllers)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def body(carry: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], Metrics]:
        total, controllers = carry
        rows, number = part
        gradients, (metrics, controllers) = f(rows, jax.random.fold_in(key, number), controllers)
        return (jax.tree.map(jnp.add, total, gradients), controllers), metrics

    rows = jax.tree.map(split, dict(batch))
    shapes, _ = jax.eval_shape(f, jax.tree.map(lambda x: x[0], rows), key, controllers)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (total, controllers), metrics = jax.lax.scan(
        body, (zeros, controllers), (rows, jnp.arange(parts))
    )
    mean = jax.tree.map(lambda x: x / parts, total)
    return mean, (jax.tree.map(lambda x: x.mean(0), metrics), controllers)


def make_forward(
    skeleton: Skeleton, objective: Objective, take: Callable[[Array, Report], Any]
) -> Callable[[Weights, Batch, Any], Any]:
    """(weights, batch, key) -> take(logits, report) under the objective's plan, jitted; key may be
    None."""

    @jax.jit
    def forward(weights: Weights, batch: Batch, key: Any) -> Any:
        inputs = objective.inputs(batch)
        return take(*objective.run(skeleton.merge(*weights), inputs, Call(key=key)))

    return forward


def make_eval_step(
    skeleton: Skeleton, objective: Objective, layout: Layout
) -> Callable[[Weights, Batch, Any], dict[str, Array]]:
    """(weights, batch, key) -> sums over the valid rows under the objective's plan; see
    `Objective.sums`."""

    @jax.jit
    def eval_step(weights: Weights, batch: Batch, key: Any) -> dict[str, Array]:
        model = skeleton.merge(*weights)
        logits, report = objective.run(model, objective.inputs(batch), Call(key=key))
        return objective.sums(logits, report, batch, layout)

    return eval_step
