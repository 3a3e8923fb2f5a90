"""The loss of distillation against float64, and a student that becomes its teacher."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from peerjax.objectives.distillation import (
    Distillation,
    LiveTeacher,
    cosine,
    output_distance,
    towards,
)
from peerjax.training.gradients import loss_and_gradients
from tests.training.test_step import LENGTH, ROWS, VOCABULARY, make, make_batch

STEPS = 10
WEIGHTS = Distillation(alpha=(0.9, 0.5), temperature=(2.0, 1.0), beta=(1.0, 0.1))


def draw_teacher(task):
    return LiveTeacher(task.model, jax.jit(task.init)(jax.random.key(7)))


def apply(task, variables, batch):
    inputs = (batch["inputs"], batch["positions"], batch["segments"])
    read = jax.jit(functools.partial(task.model.apply, mutable=["outputs"]))
    logits, sown = read(variables, *inputs)
    outputs = task.model.config.in_order(sown["outputs"], "feed_forward")
    return np.asarray(logits, np.float64), np.asarray(outputs, np.float64)


@pytest.mark.parametrize("step", [0, 4, STEPS, 2 * STEPS])
def test_the_loss_is_that_of_the_formula(step):
    _, task, _, state = make()
    teacher, batch = draw_teacher(task), make_batch()
    batch["positions"] = batch["positions"] % 20  # two documents a row
    batch["segments"] = jnp.asarray(np.arange(LENGTH) // 20 + np.zeros((ROWS, 1), int), jnp.int32)
    weights = Distillation(alpha=(0.8, 0.3), temperature=(3.0, 1.0), beta=(2.0, 0.5))
    distilled = towards(task, teacher, weights, STEPS)
    found, _ = jax.jit(functools.partial(loss_and_gradients, distilled, frozen=teacher.frozen))(
        state.variables, batch, step=jnp.int32(step)
    )
    part = 0.5 + 0.5 * np.cos(np.pi * min(step / STEPS, 1))
    alpha, temperature, beta = (last + (first - last) * part for first, last in
                                ((0.8, 0.3), (3.0, 1.0), (2.0, 0.5)))  # fmt: skip
    (logits, outputs), (wanted, outputs_of_teacher) = (
        apply(task, each, batch) for each in (state.variables, teacher.frozen)
    )
    log_p, log_q = (scipy.special.log_softmax(each / temperature, -1) for each in (wanted, logits))
    apart = temperature**2 * np.sum(np.exp(log_p) * (log_p - log_q), -1)
    log_probs = scipy.special.log_softmax(logits, -1)
    of_text = -np.take_along_axis(log_probs, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    later = np.asarray(batch["positions"]) > 0
    distances = [
        np.sum((own - other)[later] ** 2) / np.sum(other[later] ** 2)
        for own, other in zip(outputs, outputs_of_teacher, strict=True)
    ]
    expected = alpha * apart.mean() + (1 - alpha) * of_text.mean() + beta * np.mean(distances)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_student_that_is_its_teacher_is_at_no_distance():
    _, task, _, state = make()
    teacher = LiveTeacher(task.model, state.variables)
    weights = dataclasses.replace(WEIGHTS, alpha=(1.0, 1.0))
    distilled = towards(task, teacher, weights, STEPS)
    differentiate = jax.jit(functools.partial(loss_and_gradients, distilled))
    loss, gradients = differentiate(state.variables, make_batch(), frozen=teacher.frozen)
    assert abs(loss) < 1e-6
    largest = max(float(np.max(np.abs(each))) for each in jax.tree.leaves(gradients.params))
    assert largest < 1e-5


def test_without_outputs_the_models_may_differ_in_width_and_depth():
    _, task, _, state = make()
    _, wider, _, _ = make(**{"model.width": 32, "model.layers": (("dense", 1),)})
    teacher = draw_teacher(wider)
    weights = dataclasses.replace(WEIGHTS, beta=(0.0, 0.0))
    weights.check(task.model.config, wider.model.config)
    distilled = towards(task, teacher, weights, STEPS)
    assert not distilled.keeps
    differentiate = jax.jit(functools.partial(loss_and_gradients, distilled))
    loss, _ = differentiate(state.variables, make_batch(), frozen=teacher.frozen)
    assert 0 < loss < 10 * np.log(VOCABULARY)
    with pytest.raises(ValueError, match="student has depth 2 and the teacher 1, so their layers"):
        WEIGHTS.check(task.model.config, wider.model.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": (0.9,)}, r"distill.alpha=\(0.9,\) is not a pair"),
        ({"alpha": (0.9, 1.5)}, r"distill.alpha=1.5 is not in \[0, 1\]"),
        ({"temperature": (0.0, 1.0)}, "distill.temperature=0.0 is not positive"),
        ({"beta": (1.0, -1.0)}, "distill.beta=-1.0 is negative"),
        ({"top_k": VOCABULARY}, f"distill.top_k={VOCABULARY} is not in "),
        ({"top_k": 4, "temperature": (3.0, 1.0)}, r"temperature=3.0 is not one of 1.0, 1.25, 1.5"),
    ],
)
def test_weights_out_of_range_are_named(changes, message):
    _, task, _, _ = make()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WEIGHTS, **changes).check(task.model.config, task.model.config)


def test_with_few_likely_tokens_the_temperature_steps_on_its_grid():
    _, task, _, state = make()
    teacher, batch = draw_teacher(task), make_batch()
    weights = Distillation(alpha=(1.0, 1.0), temperature=(2.0, 1.0), beta=(0.0, 0.0), top_k=5)
    distilled = towards(task, teacher, weights, STEPS)
    (logits, _), (wanted, _) = (
        apply(task, each, batch) for each in (state.variables, teacher.frozen)
    )
    differentiate = jax.jit(functools.partial(loss_and_gradients, distilled))
    for step, temperature in ((0, 2.0), (3, 2.0), (4, 1.5), (7, 1.25), (9, 1.0)):
        found, _ = differentiate(
            state.variables, batch, frozen=teacher.frozen, step=jnp.int32(step)
        )
        order = np.argsort(-wanted, -1, kind="stable")
        probabilities = [
            np.take_along_axis(scipy.special.softmax(each / temperature, -1), order, -1)
            for each in (wanted, logits)
        ]
        p, q = (
            np.concatenate([each[..., :5], each[..., 5:].sum(-1, keepdims=True)], -1)
            for each in probabilities
        )
        expected = temperature**2 * np.mean(np.sum(p * np.log(p / q), -1))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-7)


def test_first_positions_are_left_out_of_the_distance():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 2, 5, 4)).astype(np.float32)
    positions = jnp.asarray([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    found = output_distance(jnp.asarray(student), jnp.asarray(teacher), positions)
    teacher[:, np.asarray(positions) == 0] *= 1e4
    again = output_distance(jnp.asarray(student), jnp.asarray(teacher), positions)
    np.testing.assert_allclose(again, found, rtol=1e-6)
    alone = output_distance(jnp.asarray(student), jnp.asarray(teacher), jnp.zeros((2, 5), int))
    np.testing.assert_array_equal(alone, 0)


def test_a_cosine_goes_from_one_end_to_the_other():
    values = [float(cosine((2.0, 1.0), step, 8)) for step in (0, 2, 4, 8, 9)]
    expected = [2, 1 + (1 + np.sqrt(0.5)) / 2, 1.5, 1, 1]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
