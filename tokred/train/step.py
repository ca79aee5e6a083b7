"""The one training step and the one evaluation step: pure, jitted, over flat dicts of arrays."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from tokred.plan import Call, Layout, Plan, Report
from tokred.train.losses import Objective
from tokred.train.metrics import batch_sums
from tokred.train.state import Arrays, Skeleton, State

Batch = Mapping[str, Any]  # arrays of numpy or of JAX
TrainStep = Callable[[State, Batch, PRNGKeyArray], tuple[State, dict[str, Array]]]


def make_train_step(
    skeleton: Skeleton,
    objective: Objective,
    tx: optax.GradientTransformation,
    trainable: Sequence[str],
) -> TrainStep:
    """(state, batch, key) -> (state, metrics); the given state is consumed.

    batch: 'image' [B Y X C], 'label' [B]. key: the seed's; the step's own is folded out of it, so
    a resumed run draws what an uninterrupted one draws. Gradients exist for `trainable` alone.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: State, batch: Batch, key: PRNGKeyArray) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(key, state["step"])
        learned = {name: state["params"][name] for name in trainable}

        def loss_of(learned: Arrays) -> tuple[Array, dict[str, Array]]:
            model = skeleton.merge({**state["params"], **learned}, state["rest"])
            return objective(model, batch, key)

        gradients, metrics = jax.grad(loss_of, has_aux=True)(learned)
        updates, opt = tx.update(gradients, state["opt"], learned)
        fresh: Any = optax.apply_updates(learned, updates)
        params = {**state["params"], **fresh}
        return {**state, "params": params, "opt": opt, "step": state["step"] + 1}, metrics

    return train_step


def make_forward(
    skeleton: Skeleton, plan: Plan
) -> Callable[[Arrays, Arrays, Array, Any], tuple[Float[Array, "B C"], Report]]:
    """(params, rest, images, key) -> (logits, report), jitted; key may be None."""

    @jax.jit
    def forward(params: Arrays, rest: Arrays, images: Array, key: Any) -> tuple[Array, Report]:
        return skeleton.merge(params, rest)(images, plan=plan, call=Call(key=key))

    return forward


def make_eval_step(
    skeleton: Skeleton, plan: Plan, layout: Layout
) -> Callable[[Arrays, Arrays, Batch, Any], dict[str, Array]]:
    """(params, rest, batch, key) -> sums over the valid rows; see `metrics.batch_sums`."""

    @jax.jit
    def eval_step(params: Arrays, rest: Arrays, batch: Batch, key: Any) -> dict[str, Array]:
        model = skeleton.merge(params, rest)
        logits, report = model(batch["image"], plan=plan, call=Call(key=key))
        return batch_sums(logits, report.sources, batch, layout)

    return eval_step
