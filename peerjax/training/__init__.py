"""The training loop and what it keeps: state, step, checkpoints, metrics, report."""
