"""Where gradients flow, and where they must not."""

import functools
from typing import Any

import jax
import numpy as np

from tests.conformance.setting import KEY, ODD, easy, images_of, loss_of, model_of, training
from tests.methods_table import Row
from tokred.plan import Plan
from tokred.train.state import path_name

Gradients = tuple[dict[str, np.ndarray], np.ndarray]


def by_path(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def gradients(plan: Plan, remat: bool = False) -> Gradients:
    """(by parameter path, of the pixels)."""
    graph, state = model_of(ODD, plan)
    loss = loss_of(graph, plan)
    loss = jax.checkpoint(loss) if remat else loss
    params, pixels = jax.jit(jax.grad(loss, (0, 1)))(state, images_of(ODD), KEY)
    return by_path(params), np.asarray(pixels)


def check_gradients_reach_the_backbone(row: Row) -> None:
    for plan in {easy(row), training(row)}:
        params, pixels = gradients(plan)
        assert all(np.isfinite(g).all() for g in params.values()) and np.isfinite(pixels).all()
        assert (pixels != 0).reshape(len(pixels), -1).any(-1).all()
        kernels = {
            n: g for n, g in params.items() if n.endswith("kernel") and "reductions" not in n
        }
        assert len(kernels) == 6 * ODD.depth + 2
        assert [name for name, g in kernels.items() if not g.any()] == []


def check_packed_twin_does_not_learn(row: Row) -> None:
    """The choice stops the gradient: none reaches what a method learns."""
    learned = {n: g for n, g in gradients(easy(row))[0].items() if n.startswith("reductions")}
    assert bool(learned) == row.learned
    assert [name for name, g in learned.items() if g.any()] == []


def check_soft_twin_learns(row: Row) -> None:
    """From the logits alone; behind the last attention nothing can change the class token."""
    last = f"reductions/mid_{ODD.depth - 1}/"
    learned = {n: g for n, g in gradients(training(row))[0].items() if n.startswith("reductions")}
    assert learned
    assert [n for n, g in learned.items() if not (g.any() or n.startswith(last))] == []


def check_survives_checkpointing(row: Row) -> None:
    plain, again = gradients(training(row)), gradients(training(row), remat=True)
    np.testing.assert_allclose(again[1], plain[1], rtol=1e-3, atol=1e-6)
    for name, value in plain[0].items():
        np.testing.assert_allclose(again[0][name], value, rtol=1e-3, atol=1e-5, err_msg=name)
