"""How many numbers the matrix products of a program write: what training has to hold."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

PRODUCTS = ("dot_general", "conv_general_dilated")


def activations(f: Callable[..., Any], *args: Any) -> int:
    """Elements that matrix products and convolutions of f(*args) write (timm's 'activations');
    attention's logits count where it is not one kernel. Of a choice, its dearest branch."""
    return _elements(jax.make_jaxpr(f)(*args).jaxpr)


def _elements(jaxpr: core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, [_elements(j) for j in _inside(eqn.params)]
        if name in PRODUCTS:
            total += sum(v.aval.size for v in eqn.outvars)  # type: ignore[attr-defined]
        elif name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * (eqn.params["length"] if name == "scan" else 1)
    return total


def _inside(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The programs among an equation's parameters."""
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each
