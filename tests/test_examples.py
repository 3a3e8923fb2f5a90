"""The examples reach what they promise."""

import pytest

pytest.importorskip("sklearn")
from examples import digits, digits_nnx


@pytest.mark.slow
def test_int4_matrices_reach_the_accuracy_of_adamw_in_an_eighth_of_its_bytes():
    found = digits.compare(seeds=3)
    (floats, float_bytes), (packed, bytes_) = found["float32, AdamW"], found["int4"]
    assert floats > 0.96
    assert packed > floats - 0.005
    assert bytes_ <= float_bytes / 8
    accuracy, size = digits_nnx.train(seed=0)
    assert accuracy > floats - 0.015  # one seed
    assert size == bytes_
