"""One file per method; importing this package registers them all."""

from tokred.methods import (  # noqa: I001  (registration order is the order of the table)
    dense,
    random,
    uniform,
    pooling,
    topk,
    evit,
    tome,
    dynamicvit,
    diffrate,
)
from tokred.methods.registry import (
    Method,
    get_method,
    golden_passed,
    list_methods,
    make_plan,
    register,
)

__all__ = [
    "Method",
    "dense",
    "diffrate",
    "dynamicvit",
    "evit",
    "get_method",
    "golden_passed",
    "list_methods",
    "make_plan",
    "pooling",
    "random",
    "register",
    "tome",
    "topk",
    "uniform",
]
