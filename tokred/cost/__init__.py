"""What a plan costs: counted, compiled, timed, and solved for."""

from tokred.cost.bench import bench
from tokred.cost.budget import solve_keep
from tokred.cost.compiled import Compiled, compile_cost, compiled_macs
from tokred.cost.macs import LayerCost, expected_macs, layer_costs, macs
from tokred.cost.timing import Rounds, Timing, time_rounds

__all__ = [
    "Compiled",
    "LayerCost",
    "Rounds",
    "Timing",
    "bench",
    "compile_cost",
    "compiled_macs",
    "expected_macs",
    "layer_costs",
    "macs",
    "solve_keep",
    "time_rounds",
]
