"""Settings of all comparisons of losses: recipe, length, seeds, evaluation."""

from benchmarks.sweep import Settings

RECIPE = "quickstart"
STEPS, QUICK_STEPS = 500, 12
SEEDS = (0, 1, 2)
# There are enough rows that the error of the validation loss itself does not matter.
EVALUATION: Settings = {
    "eval.rows": 96, "eval.every": 500, "checkpoint.every": 250, "peer.query_norm": "batchnorm",
}  # fmt: skip
SHARED, OF_POOLS = "optimizer.learning_rate", "pool.learning_rate"
# Learning rates to tune, with start values: of models with pools or packed matrices, and of other
# models.
START = {SHARED: 1e-2, OF_POOLS: 3e-2}
START_WITHOUT_POOLS = {SHARED: START[SHARED]}
