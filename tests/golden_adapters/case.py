"""A stored case, and how an adapter is run on it and compared."""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

Compare = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """The arrays of one file without their prefixes; under jit `inputs` and `params` are traced.

    settings: scalars and short lists as Python values, static.
    """

    settings: Mapping[str, Any]
    inputs: Mapping[str, Any]
    params: Mapping[str, Any]
    outputs: Mapping[str, np.ndarray]

    @classmethod
    def load(cls, path: Path) -> "Case":
        with np.load(path) as stored:
            arrays = dict(stored)
        part = lambda prefix: {  # noqa: E731
            name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)
        }
        settings = {name: _doubles(a).tolist() for name, a in part("cfg_").items()}
        return cls(settings, part("in_"), part("param_"), part("out_"))


def _doubles(a: np.ndarray) -> np.ndarray:
    """Numbers as the official code had them: 0.7, not the float32 next to it that was stored."""
    return a.astype(str).astype(float) if a.dtype == np.float32 else a


@dataclass(frozen=True)
class Output:
    """How one output is compared: tolerances, and what is done to (wanted, got) before."""

    rtol: float = 1e-4
    atol: float = 1e-5
    prepare: Compare = lambda want, got: (want, got)


def sorted_rows(want: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prepares outputs whose last axis is a set."""
    return np.sort(want, axis=-1), np.sort(got, axis=-1)


exact = Output(0.0, 0.0)


@dataclass(frozen=True)
class Adapter:
    """`make(case)` gives the outputs by name. jit: False where they are not all arrays.

    rules: Output by pattern of the output's name, the first that fits; '' is the default.
    group: another 'family/group' that a case counts for, or None.
    """

    make: Callable[[Case], Mapping[str, Any]]
    rules: Mapping[str, Output] = field(default_factory=dict)
    jit: bool = True
    group: Callable[[Case], str | None] = lambda case: None

    def __call__(self, case: Case) -> Mapping[str, Any]:
        if not self.jit:
            return self.make(case)

        def run(inputs: Any, params: Any) -> Mapping[str, Any]:
            return self.make(dataclasses.replace(case, inputs=inputs, params=params))

        return jax.jit(run)(case.inputs, case.params)

    def rule(self, output: str) -> Output:
        fits = (rule for glob, rule in self.rules.items() if fnmatch.fnmatch(output, glob))
        return next(fits, Output())
