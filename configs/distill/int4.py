"""Distils a trained model to pools of int4, which starts from its rounded weights.

The student has the teacher's text and model. It reads a million tokens at the quickstart's sizes.
"""

from peerjax.config import config_of_student


def get_config():
    config = config_of_student()
    config.steps = 478
    config.pool.storage = "int4"
    config.distill.start = "rounded"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20
    config.pool.learning_rate = 3e-3
    config.eval.every = 120
    return config
