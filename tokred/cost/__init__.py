"""What a plan costs: counted, compiled, timed, and solved for."""

from tokred.cost.bench import bench
from tokred.cost.budget import solve_keep
from tokred.cost.compiled import Compiled, compile_cost, compiled_macs
from tokred.cost.macs import expected_macs, macs
from tokred.cost.timing import Timing, time_rounds

__all__ = [
    "Compiled",
    "Timing",
    "bench",
    "compile_cost",
    "compiled_macs",
    "expected_macs",
    "macs",
    "solve_keep",
    "time_rounds",
]
