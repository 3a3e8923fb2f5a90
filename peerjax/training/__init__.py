"""The training loop with its state, step, checkpoints, metrics and report."""
