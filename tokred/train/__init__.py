"""Training: one pure step, its state, losses, metrics, checkpoints, and the jobs made of them."""
