"""The examples reach what they promise."""

import json
import operator
import os

import jax
import numpy as np
import optax
import pytest

if "CI" not in os.environ:  # where a missing library is a failure
    pytest.importorskip("sklearn")
from examples import digits, digits_nnx
from peerjax import optim
from tests.elsewhere import python


@pytest.mark.slow
def test_int4_matrices_reach_the_accuracy_of_adamw_in_an_eighth_of_its_bytes():
    found = json.loads(python("-m", "tests.train_digits", as_users=True).stdout)
    (floats, float_bytes), (packed, bytes_) = found["float32, AdamW"], found["int4"]
    assert floats > 0.96
    assert packed > floats - 0.005
    assert bytes_ <= float_bytes / 8
    assert np.mean([accuracy for accuracy, _ in found["nnx"]]) > floats - 0.005
    assert {size for _, size in found["nnx"]} == {bytes_}


def test_masked_and_injected_transforms_train_the_classifier_alike(monkeypatch):
    monkeypatch.setattr(digits, "STEPS", 40)
    params = digits.pack_matrices(digits.init(0))
    packed = jax.tree.map(optim.is_packed_matrix, params, is_leaf=optim.is_packed_matrix)
    floats = jax.tree.map(operator.not_, packed)
    schedule = optax.cosine_decay_schedule(3e-3, 40)
    inject = optax.inject_hyperparams(optim.int4_accumulation, static_args=("accumulator_bits",))

    def masked(of_matrices):
        of_matrices = optax.chain(optax.clip_by_global_norm(1.0), of_matrices)
        return optax.chain(
            optax.masked(of_matrices, packed), optax.masked(digits.float_transform(), floats)
        )

    accuracies = {
        digits.train(digits.pack_matrices(digits.init(0)), transform, digits.logits, seed=0)[0]
        for transform in (
            digits.int4_transform(params, seed=0),
            masked(optim.int4_accumulation(schedule)),
            masked(inject(learning_rate=schedule)),
        )
    }
    assert len(accuracies) == 1
    assert accuracies.pop() > 0.5


def test_the_nnx_model_keeps_no_traced_weights(monkeypatch):
    monkeypatch.setattr(digits, "STEPS", 1)
    with jax.checking_leaks():
        digits_nnx.train(seed=0)
