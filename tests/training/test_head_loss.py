"""The loss by parts of a batch against the loss of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peerjax.training.head_loss import LARGEST_PART, mean_loss_in_parts, number_of_parts
from tests.conftest import compile_as_users_do

B, L, D, V = 8, 16, 12, 500


def loss_of_rows(head, x, rows, fixed):
    logits = x @ head["kernel"]
    return fixed * optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])


def whole(*operands):
    return jnp.mean(loss_of_rows(*operands))


def make(batch=B, vocabulary=V):
    keys = jax.random.split(jax.random.key(0), 3)
    head = {"kernel": jax.random.normal(keys[0], (D, vocabulary))}
    x = jax.random.normal(keys[1], (batch, L, D))
    targets = jax.random.randint(keys[2], (batch, L), 0, vocabulary)
    return head, x, {"targets": targets}, jnp.float32(0.7)


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_loss_and_gradients_are_those_of_the_whole_batch(parts):
    head, x, rows, fixed = make()

    def differentiate(function):
        def loss(head, x):
            return jnp.square(function(head, x, rows, fixed))  # a cotangent that is not 1

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(head, x)

    def in_parts(*operands):
        return mean_loss_in_parts(loss_of_rows, parts, *operands)

    found, expected = differentiate(in_parts), differentiate(whole)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(in_parts(head, x, rows, fixed), whole(head, x, rows, fixed), 1e-6)


def test_memory_holds_the_logits_of_one_part():
    operands = make(batch=16, vocabulary=8000)
    sizes = []
    for function in (whole, lambda *each: mean_loss_in_parts(loss_of_rows, 8, *each)):
        lowered = jax.jit(jax.value_and_grad(function, (0, 1))).lower(*operands)
        sizes.append(compile_as_users_do(lowered).memory_analysis().temp_size_in_bytes)
    logits = 16 * L * 8000 * 4
    assert sizes[0] > logits
    assert sizes[1] < 0.4 * logits


@pytest.mark.parametrize(
    ("rows", "logits", "parts"),
    [(16, LARGEST_PART, 1), (16, LARGEST_PART + 1, 2), (16, 5 * LARGEST_PART, 8), (6, 1 << 40, 6)],
)
def test_parts_divide_the_rows(rows, logits, parts):
    assert number_of_parts(rows, logits) == parts
