"""Every storage and every rule trains, and is restored, by the same code."""

import numpy as np
import pytest
from etils import epath

from peerjax.training.loop import train
from peerjax.training.metrics import read_metrics
from tests.training.tiny import SAVE_EVERY, STEPS, tiny_config

CHOICES = [
    ("float32", "adamw", None),
    ("bfloat16", "rowwise", None),
    ("int8", "rowwise", 0),
    ("int4", "eco", None),
    ("ternary", "rowwise", 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "rule", "accumulator_bits"), CHOICES)
def test_learns_and_goes_on(storage, rule, accumulator_bits, corpus, tmp_path):
    def config(steps):
        config = tiny_config(corpus)
        config.steps = steps
        config.pool.storage = storage
        config.pool.rule = rule
        config.pool.accumulator_bits = accumulator_bits
        return config

    train(config(SAVE_EVERY), str(tmp_path))
    train(config(STEPS), str(tmp_path))
    losses = [record["loss"] for record in read_metrics(epath.Path(tmp_path)) if "loss" in record]
    assert len(losses) == STEPS
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
