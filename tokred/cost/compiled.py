"""What the compiler says a function costs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from tokred.ops import Choice, watch_choices


@dataclass(frozen=True)
class Compiled:
    """A compiled function with its costs.

    run: takes the arguments it was compiled for · macs: half the flops that the compiler counts,
    elementwise ones included · seconds: tracing, lowering and compiling · bytes: that it counts as
    read and written · temp_bytes: peak memory beside arguments and results · choices:
    implementations of operations, see `watch_choices`.
    """

    run: Callable[..., Any]
    macs: float
    seconds: float
    bytes: float
    temp_bytes: int
    choices: tuple[Choice, ...] = ()


def compile_cost(f: Callable[..., Any], *args: Any, donate: Sequence[int] = ()) -> Compiled:
    """`f` compiled for `args`. A persistent compilation cache makes `seconds` meaningless.

    donate: places of the arguments whose memory the results may take."""
    start = time.perf_counter()
    with watch_choices() as choices:
        run = jax.jit(f, donate_argnums=donate).lower(*args).compile()
    seconds = time.perf_counter() - start
    counted: Any = run.cost_analysis()
    memory: Any = run.memory_analysis()
    moved = counted.get("bytes accessed", 0.0)
    return Compiled(
        run,
        counted["flops"] / 2,
        seconds,
        moved,
        memory.temp_size_in_bytes,
        tuple(dict.fromkeys(choices)),
    )


def compiled_macs(f: Callable[..., Any], *args: Any) -> float:
    """Half the flops that the compiler counts for f(*args)."""
    return compile_cost(f, *args).macs
