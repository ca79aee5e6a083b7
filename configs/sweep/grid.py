"""Questions about grids of digits: merging, Matryoshka queries and p-MoD, each alone and all three
under one budget.

python -m tokred sweep configs/sweep/grid.py --workdir=runs/sweep_grid
"""

from tokred.train.sweep import Sweep, Trial

RATIOS = (0.7, 0.65, 0.6)


def get_sweep() -> Sweep:
    start = ("start_from={dense}",)
    alone = "configs/grid_continued.py"  # trains what is named below, with the same steps
    return Sweep(
        dense="configs/grid_dense.py",
        ratios=RATIOS,
        trials={
            "merging": Trial(alone, "train.macs", RATIOS, ("train.method=tome", *start)),
            "queries": Trial(
                alone,
                "train.macs",
                (0.7, 0.65),
                ("train.method=mqt", "train.options.start=local", *start),
            ),
            "depths": Trial("configs/grid_depths.py", "beside.decoder/pmod.keep", (0.7,), start),
            "all three": Trial("configs/grid_composed.py", "train.macs", (0.65, 0.6, 0.55), start),
        },
        score="exact",
        depth=("model.vision.depth", "model.decoder.depth"),
    )
