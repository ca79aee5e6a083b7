"""Real digits among clutter: learned rates and learned predictors at three budgets each.

python -m tokred sweep configs/sweep/digits.py --workdir=runs/sweep_digits
"""

from tokred.train.sweep import Sweep, Trial

RATIOS = (0.5, 0.65, 0.8)


def get_sweep() -> Sweep:
    rates = ("train.steps=0", "start_from={dense}")  # learned on the dense model of the same seed
    return Sweep(
        dense="configs/digits_dense.py",
        ratios=RATIOS,
        trials={
            "diffrate": Trial("configs/digits_diffrate.py", "rates.target", RATIOS, rates),
            "dynamicvit": Trial(
                "configs/digits_dynamicvit.py", "train.options.keep", (0.4, 0.6, 0.8)
            ),
        },
    )
