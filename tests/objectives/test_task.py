"""A task with a frozen teacher and a schedule, trained by the loop that trains everything."""

import jax
import jax.numpy as jnp
import optax
import pytest

from peerjax.objectives import language
from peerjax.objectives.task import inputs_of
from peerjax.training.loop import train
from peerjax.training.step import make_train_step
from tests.training.test_resume import assert_resumes, losses
from tests.training.test_step import make, make_batch
from tests.training.tiny import STEPS, tiny_config


def from_teacher(config, corpus):
    """The model is to predict what a frozen one predicts; more and more so, step by step."""
    task = language(config, corpus)
    teacher = jax.jit(task.init)(jax.random.key(7))

    def loss(logits, kept, batch, frozen, step):
        wanted = jax.nn.softmax(task.model.apply(frozen, *inputs_of(batch)))
        apart = optax.losses.kl_divergence_with_log_targets(
            jax.nn.log_softmax(logits), jnp.log(wanted)
        )
        share = jnp.minimum(step / STEPS, 1)
        return share * apart + (1 - share) * task.loss(logits, kept, batch, frozen, step)

    return task._replace(loss=loss, frozen=teacher)


@pytest.mark.slow
def test_it_trains_with_the_teacher_as_an_argument_and_resumes_bit_equally(corpus, tmp_path):
    config = tiny_config(corpus)
    config.model.layers = (("dense", 1),)
    assert_resumes(config, tmp_path, from_teacher)
    plain = losses(train(config, str(tmp_path / "plain")) or tmp_path / "plain")
    assert losses(tmp_path / "whole")[0] == plain[0]  # the teacher has no share yet
    assert losses(tmp_path / "whole")[-1] < plain[-1] / 2


def test_the_teacher_is_no_constant_of_the_step():
    config, task, optimizer, state = make()
    teacher = jax.jit(task.init)(jax.random.key(7))

    def loss(logits, kept, batch, frozen, step):
        return jnp.square(logits - task.model.apply(frozen, *inputs_of(batch))).mean(-1)

    step = make_train_step(config, task._replace(loss=loss, frozen=teacher), optimizer)
    constants = jax.make_jaxpr(step)(state, make_batch(), teacher).consts
    assert sum(each.size for each in constants) < teacher["params"]["embed"]["embedding"].size
    found = [
        jax.jit(step)(state, make_batch(), each)[1]["loss"] for each in (teacher, state.variables)
    ]
    assert found[0] > 0
    assert abs(found[1]) < 1e-12  # a teacher that is the model itself
