"""Questions about grids of digits: merging, Matryoshka queries and p-MoD, each alone and all three
under one budget.

python -m tokred sweep configs/sweep/grid.py --workdir=runs/sweep_grid
"""

from tokred.train.sweep import Sweep, Trial

BUDGETS = (0.65, 0.6, 0.55)


def get_sweep() -> Sweep:
    start = ("start_from={dense}",)
    merging = ("train.method=tome", *start)
    return Sweep(
        dense="configs/grid_dense.py",
        ratios=(0.65,),
        trials={
            "merging": Trial("configs/grid_continued.py", "train.macs", BUDGETS, merging),
            "queries": Trial("configs/grid_queries.py", "beside.mqt.length", (16, 8), start),
            "depths": Trial("configs/grid_depths.py", "beside.decoder/pmod.keep", (0.5,), start),
            "all three": Trial("configs/grid_composed.py", "train.macs", BUDGETS, start),
        },
        score="exact",
        depth=("model.vision.depth", "model.decoder.depth"),
    )
