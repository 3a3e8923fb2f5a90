"""Adaptive gates against the vector of their definition, finite differences and counting."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerjax.routing.gates import (
    jump_relu,
    jump_relu_gate,
    passes,
    step_function,
    threshold_at,
    threshold_gate,
)
from peerjax.routing.running import THRESHOLD_RATE, Active, Threshold, pooled, updated

HEADS, TOKENS, K = 3, 40, 8


def draw_scores(seed=0):
    """Scores of retrieved experts, best first."""
    scores = 5 + jax.random.normal(jax.random.key(seed), (HEADS, TOKENS, K))
    return jnp.sort(scores, axis=-1, descending=True)


def test_the_vector_of_the_definition():
    z, threshold, bandwidth = jnp.array([0.10, 0.52, 0.48, 1.0]), jnp.float32(0.5), jnp.float32(0.1)
    np.testing.assert_allclose(jump_relu(z, threshold, bandwidth), [0, 0.52, 0, 1.0])
    np.testing.assert_array_equal(step_function(z, threshold, bandwidth), [0, 1, 0, 1])

    def by_threshold(function):
        return jax.jacobian(function, argnums=1)(z, threshold, bandwidth)

    np.testing.assert_allclose(by_threshold(jump_relu), [0, -5, -5, 0], rtol=1e-6)
    np.testing.assert_allclose(by_threshold(step_function), [0, -10, -10, 0], rtol=1e-6)
    by_z = jnp.diag(jax.jacobian(jump_relu)(z, threshold, bandwidth))
    np.testing.assert_array_equal(by_z, [0, 1, 0, 1])
    assert not np.any(jax.jacobian(step_function)(z, threshold, bandwidth))


@partial(jax.jit, static_argnums=0)
def slope(function, z, threshold, bandwidth):
    return jax.grad(lambda threshold: jnp.sum(function(z, threshold, bandwidth)))(threshold)


@settings(deadline=None)
@given(st.floats(0.1, 3), st.floats(0.02, 0.5), st.integers(0, 9))
def test_surrogates_are_central_differences_over_the_window(threshold, bandwidth, seed):
    # Over many scores, the step function's count is nearly smooth. Its central difference with half
    # a bandwidth to each side is the surrogate.
    z = jnp.asarray(np.random.default_rng(seed).normal(threshold, 1, 5000), jnp.float32)
    threshold, bandwidth = jnp.float32(threshold), jnp.float32(bandwidth)
    low, high = threshold - bandwidth / 2, threshold + bandwidth / 2
    in_window = (z > low) & (z < high)

    found = [slope(each, z, threshold, bandwidth) for each in (step_function, jump_relu)]

    difference = (np.sum(z > high) - np.sum(z > low)) / bandwidth
    np.testing.assert_allclose(found[0], difference, rtol=1e-5, atol=1.1 / bandwidth)
    # jump_relu has the threshold in place of z, from which it differs by half a bandwidth at most.
    difference = -float(jnp.sum(z, where=in_window)) / bandwidth
    error = abs(found[1] - difference)
    assert error <= 0.5 * in_window.sum() + 1.1 * high / bandwidth


def test_jump_relu_gates_sum_to_the_heads_and_its_penalty_counts():
    scores, target = draw_scores(), 7.5
    threshold = threshold_at(scores, target / HEADS)
    is_active = np.asarray(scores > threshold[:, None, None])
    mean_active = jnp.mean(scores, where=is_active)
    gate = jump_relu_gate(threshold, mean_active, jnp.float32(0.1), target, training=False)
    np.testing.assert_allclose(jnp.sum(gate.weigh(scores)) / TOKENS, HEADS, rtol=1e-5)
    np.testing.assert_array_equal(gate.is_kept(scores), is_active)
    assert gate.penalty(scores) == pytest.approx(0, abs=1e-9)
    lower = jump_relu_gate(threshold - 0.5, mean_active, jnp.float32(0.1), target, training=False)
    active = np.sum(scores > threshold[:, None, None] - 0.5) / TOKENS
    assert lower.penalty(scores) == pytest.approx(float((active / target - 1) ** 2), rel=1e-5)
    gradient = jax.jit(jax.grad(lambda scores: lower.penalty(scores)))(scores)
    assert not np.any(gradient)


def test_training_keeps_the_scores_within_the_window():
    scores = draw_scores()
    threshold, bandwidth = jnp.array([4.5, 5.0, 5.5]), jnp.float32(0.4)
    kept = [
        np.asarray(jump_relu_gate(threshold, jnp.float32(5), bandwidth, 4.0, each).is_kept(scores))
        for each in (False, True)
    ]
    below = np.asarray(scores) > np.asarray(threshold)[:, None, None] - 0.2
    np.testing.assert_array_equal(kept[1], below)
    assert kept[1].sum() > kept[0].sum()
    # Whatever is left out gives the thresholds no gradient.

    def gradient(scores):
        def weighed(threshold):
            gate = jump_relu_gate(threshold, jnp.float32(5), bandwidth, 4.0, training=True)
            return jnp.sum(jnp.sin(gate.weigh(scores))) + gate.penalty(scores)

        return jax.jit(jax.grad(weighed))(threshold)

    lowest = jnp.finfo(jnp.float32).min
    np.testing.assert_allclose(
        gradient(jnp.where(kept[1], scores, lowest)), gradient(scores), rtol=1e-6
    )


@settings(deadline=None)
@given(st.integers(0, TOKENS * K), st.integers(0, 9))
def test_the_first_threshold_passes_the_wanted_number(number, seed):
    scores = draw_scores(seed)
    threshold = threshold_at(scores, number / TOKENS)
    np.testing.assert_array_equal(jnp.sum(scores > threshold[:, None, None], (1, 2)), number)


def test_the_best_expert_of_a_head_always_passes():
    scores = draw_scores()
    gate = threshold_gate(jnp.array([1e3, 5.0, -1e3]))
    kept = np.asarray(gate.is_kept(scores))
    np.testing.assert_array_equal(kept[0], np.arange(K)[None] == np.zeros((TOKENS, 1)))
    assert kept[2].all()
    gates = gate.weigh(jnp.where(kept, scores, jnp.finfo(jnp.float32).min))
    np.testing.assert_allclose(jnp.sum(gates, axis=-1), 1, rtol=1e-6)
    expected = np.where(kept, np.exp(np.asarray(scores, np.float64)), 0)
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(gates, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("parts", [1, 2, 5, 8])
def test_a_running_threshold_is_the_same_for_any_split(parts):
    scores, value = draw_scores(), jnp.array([4.5, 5.0, 5.5])
    threshold = Threshold(value, jnp.float32(0.7), jnp.float32(10 / 3))

    def count(scores):
        experts = jnp.sum(passes(scores, value), axis=(1, 2), dtype=jnp.int32)
        return Active(experts, jnp.int32(scores.shape[1]))

    split = scores.reshape(HEADS, parts, -1, K).swapaxes(0, 1)
    whole = updated({"threshold": threshold}, {"threshold": count(scores)}, 0.9)
    of_parts = pooled({"threshold": jax.vmap(count)(split)})
    found = updated({"threshold": threshold}, of_parts, 0.9)["threshold"]
    np.testing.assert_array_equal(found.value, whole["threshold"].value)
    active = np.maximum(np.sum(scores > value[:, None, None], -1), 1).mean(1)
    excess = np.clip(active / (10 / 3) - 1, -1, 1)
    np.testing.assert_allclose(found.value, value + THRESHOLD_RATE * 0.7 * excess, rtol=1e-6)
    assert np.sign(excess).tolist() == np.sign(np.asarray(found.value - value)).tolist()


def test_a_running_threshold_finds_its_target():
    threshold = Threshold(jnp.zeros(HEADS), jnp.float32(1), jnp.float32(2.5))
    for step in range(120):
        scores = draw_scores(step)
        experts = jnp.sum(passes(scores, threshold.value), axis=(1, 2), dtype=jnp.int32)
        threshold = threshold.after(Active(experts, jnp.int32(TOKENS)), 0.9)
    counts = [np.sum(passes(draw_scores(1000 + each), threshold.value)) for each in range(20)]
    np.testing.assert_allclose(np.mean(counts) / (TOKENS * HEADS), 2.5, rtol=0.03)
