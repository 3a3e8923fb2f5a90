"""Divergences from a teacher against float64 and by summing over classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from peerjax.objectives.soft_targets import (
    TEMPERATURES,
    divergence,
    divergence_from_likeliest,
    soft_targets,
)

SHAPE, V, K = (2, 5), 23, 6


def draw():
    teacher, student = 3 * np.random.default_rng(0).normal(size=(2, *SHAPE, V))
    return teacher.astype(np.float32), student.astype(np.float32)


def naive(teacher, student, temperature, k=None):
    """In float64; with k, the classes are the k likeliest tokens and the rest."""
    p, q = (
        scipy.special.softmax(np.float64(each) / temperature, -1) for each in (teacher, student)
    )
    if k is not None:
        order = np.argsort(-teacher, axis=-1)
        p, q = (np.take_along_axis(each, order, -1) for each in (p, q))
        p, q = (
            np.append(each[..., :k], each[..., k:].sum(-1, keepdims=True), -1) for each in (p, q)
        )
    return np.sum(p * np.log(p / q), axis=-1)


@pytest.mark.parametrize("level", range(len(TEMPERATURES)))
def test_divergences_are_those_of_the_classes(level):
    teacher, student = draw()
    temperature = TEMPERATURES[level]
    whole = divergence(teacher, student, jnp.float32(temperature))
    np.testing.assert_allclose(whole, naive(teacher, student, temperature), rtol=1e-5)
    found = divergence_from_likeliest(soft_targets(jnp.asarray(teacher), K), student, level)
    np.testing.assert_allclose(found, naive(teacher, student, temperature, K), rtol=1e-5, atol=1e-6)
    assert np.all(found <= whole + 1e-5)
    same = divergence_from_likeliest(soft_targets(jnp.asarray(teacher), K), teacher, level)
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_the_gradient_is_the_difference_of_probabilities_on_the_likeliest():
    teacher, student = draw()
    targets = soft_targets(jnp.asarray(teacher), K)
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(divergence_from_likeliest(targets, s, 0))))(
        student
    )
    p, q = (scipy.special.softmax(np.float64(each), -1) for each in (teacher, student))
    order = np.argsort(-teacher, axis=-1)
    is_likely = np.zeros(teacher.shape, bool)
    np.put_along_axis(is_likely, order[..., :K], True, -1)
    rest = np.sum(np.where(is_likely, 0, p), -1, keepdims=True)
    shares = q / np.sum(np.where(is_likely, 0, q), -1, keepdims=True)
    expected = q - np.where(is_likely, p, rest * shares)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_small_rest_is_exact():
    teacher = jnp.array([[30.0, 0.0, -1.0, 28.0]])
    targets = soft_targets(teacher, 2)
    np.testing.assert_array_equal(targets.ids, [[0, 3]])
    for level, temperature in enumerate(TEMPERATURES):
        log_probs = np.asarray(jax.nn.log_softmax(teacher), np.float64)[0, [1, 2]]
        expected = np.log(np.sum(np.exp(log_probs / temperature)))
        np.testing.assert_allclose(targets.rests[0, level], expected, rtol=1e-5)
    student = jnp.array([[30.0, 1.0, -1.0, 28.0]])
    found = divergence_from_likeliest(targets, student, 0)
    assert np.isfinite(found).all()
    assert np.isfinite(
        jax.jit(jax.grad(lambda s: divergence_from_likeliest(targets, s, 0)[0]))(student)
    ).all()


def test_the_likeliest_are_fewer_than_the_vocabulary():
    with pytest.raises(ValueError, match=r"k=4 is not in \[1, 4\), the size of the vocabulary"):
        soft_targets(jnp.zeros((1, 4)), 4)
