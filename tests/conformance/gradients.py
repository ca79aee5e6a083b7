"""Where gradients flow, and where they must not."""

import re
from typing import Any

import jax
import numpy as np

from tests.conformance.models import kind_of
from tests.conformance.setting import KEY, easy, inputs_of, loss_of, model_of, odd, training
from tests.methods_table import Row
from tokred.nn.skeleton import path_name
from tokred.plan import Plan

Gradients = tuple[dict[str, np.ndarray], np.ndarray]
_KNOWN: dict[Any, Gradients] = {}


def by_path(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def gradients(row: Row, plan: Plan, remat: int = 0) -> Gradients:
    """(by parameter path, of the input)."""
    config = odd(row)
    key = (config, plan, row.extra, remat)
    if key not in _KNOWN:
        graph, state = model_of(config, plan)
        loss = jax.jit(jax.grad(loss_of(graph, row, plan, remat), (0, 3)))
        params, inputs = loss(state, inputs_of(config), KEY, kind_of(config).nudge(config))
        _KNOWN[key] = by_path(params), np.asarray(inputs)
    return _KNOWN[key]


def check_gradients_reach_the_backbone(row: Row) -> None:
    for plan in {easy(row), training(row)}:
        params, inputs = gradients(row, plan)
        assert all(np.isfinite(g).all() for g in params.values()) and np.isfinite(inputs).all()
        assert (inputs != 0).reshape(len(inputs), -1).any(-1).all()
        kernels = {n: g for n, g in params.items() if _of_backbone(n)}
        assert len(kernels) == kind_of(odd(row)).kernels(odd(row))
        idle = {name for name, g in kernels.items() if not g.any()}
        assert idle == {name for name in kernels if re.search(row.unused, name)}


def _of_backbone(name: str) -> bool:
    return name.endswith("kernel") and "reductions" not in name


def learned(row: Row, plan: Plan) -> dict[str, np.ndarray]:
    """Gradients of what the method brings along."""
    return {n: g for n, g in gradients(row, plan)[0].items() if n.startswith("reductions")}


def check_packed_twin_does_not_learn(row: Row) -> None:
    """The choice stops the gradient: none reaches what a method learns."""
    found = learned(row, easy(row))
    assert bool(found) == row.learned
    assert [name for name, g in found.items() if g.any()] == []


def check_training_twin_learns(row: Row) -> None:
    """Behind the last attention nothing can change a class token."""
    last = f"reductions/mid_{odd(row).depth - 1}/"
    found = learned(row, training(row))
    assert found
    assert [n for n, g in found.items() if not (g.any() or n.startswith(last))] == []


def check_survives_checkpointing(row: Row) -> None:
    """Activations computed again in the backward pass."""
    plan = training(row)
    plain, again = gradients(row, plan), gradients(row, plan, remat=odd(row).depth)
    np.testing.assert_allclose(again[1], plain[1], rtol=1e-3, atol=1e-6)
    for name, value in plain[0].items():
        np.testing.assert_allclose(again[0][name], value, rtol=1e-3, atol=1e-5, err_msg=name)
