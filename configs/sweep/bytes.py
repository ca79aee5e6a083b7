"""Corrupted spans of bytes: a delete gate in the encoder, Mixture-of-Depths in the decoder, and
both under one budget; random and evenly spaced deletion as controls.

python -m tokred sweep configs/sweep/bytes.py --workdir=runs/sweep_bytes \\
  --config.start_from=runs/mrt5_bytes_pretrain/seed_{seed}
"""

from tokred.train.sweep import Sweep, Trial

BUDGETS = (0.8, 0.7)
SAME = ("train.options.layer=2", "train.options.capacity=None")


def get_sweep() -> Sweep:
    def deletion(name: str) -> Trial:
        return Trial(f"configs/mrt5_bytes{name}.py", "train.macs", BUDGETS, SAME)

    return Sweep(
        dense="configs/mrt5_bytes_dense.py",
        ratios=(),
        trials={
            "gate": deletion(""),
            "random": deletion("_random"),
            "stride": deletion("_stride"),
            "depths": Trial("configs/mod_bytes.py"),
            "gate and depths": Trial("configs/mrt5_mod_bytes.py", "train.macs", BUDGETS, SAME),
        },
        baselines=(),
        score="loss",
    )
