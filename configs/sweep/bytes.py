"""Corrupted spans of bytes: a delete gate in the encoder, Mixture-of-Depths in the decoder, and
both under one budget; as controls random and evenly spaced deletion, and models of fewer layers,
trained from the start for as many steps as the others in all.

python -m tokred sweep configs/sweep/bytes.py --workdir=runs/sweep_bytes \\
  --config.start_from=runs/mrt5_bytes_pretrain/seed_{seed}
"""

from tokred.train.sweep import Sweep, Trial

BUDGETS = (0.8, 0.7)
SAME = ("train.options.layer=2", "train.options.capacity=None")
# Within these 2000 steps the published 1e-5 leaves the rate eight points short of its target.
GATE = (*SAME, "train.options.integral=1e-4")
FEWER = ("model.depth=3", "start_from=", "train.steps=5000")
SPANS = ("data.options.mean_span=20.0", "data.options.density=0.15")


def get_sweep() -> Sweep:
    def deletion(name: str, budgets: tuple[float, ...], options: tuple[str, ...]) -> Trial:
        return Trial(f"configs/{name}.py", "train.macs", budgets, options)

    return Sweep(
        dense="configs/mrt5_bytes_dense.py",
        ratios=(),
        trials={
            "gate": deletion("mrt5_bytes", BUDGETS, GATE),
            "random": deletion("mrt5_bytes_random", BUDGETS[1:], SAME),
            "stride": deletion("mrt5_bytes_stride", BUDGETS[1:], SAME),
            "depths": Trial("configs/mod_bytes.py"),
            "gate and depths": deletion("mrt5_mod_bytes", BUDGETS, GATE),
            "fewer layers": Trial(
                "configs/mrt5_bytes_pretrain.py", "model.decoder_depth", (1,), (*FEWER, *SPANS)
            ),
        },
        baselines=(),
        score="loss",
    )
