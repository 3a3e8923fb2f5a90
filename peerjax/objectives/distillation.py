"""Distillation: training towards the predictions and layer outputs of a frozen teacher."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peerjax.model import Decoder, ModelConfig
from peerjax.objectives.soft_targets import divergence
from peerjax.objectives.task import Batch, Task, inputs_of
from peerjax.optim import dequantize
from peerjax.routing.auxiliary import OUTPUTS

Cosine = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Weights of the loss. Each follows a cosine from its first value to its second.

    The loss of a token is `alpha T^2 KL(teacher || student) + (1 - alpha) CE + beta F`. KL is that
    of the predictions at temperature T, CE the cross-entropy of the text, and F the
    `output_distance`.

    Attributes:
        alpha: weight of the divergence, in [0, 1].
        temperature: T, positive.
        beta: weight of the distance of layer outputs; (0, 0) leaves it out.

    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.
    """

    alpha: Cosine = (0.9, 0.5)
    temperature: Cosine = (2.0, 1.0)
    beta: Cosine = (1.0, 0.1)

    def check(self, student: ModelConfig, teacher: ModelConfig) -> None:
        """Checks the weights, and that the models have layers to compare.

        Raises:
            ValueError: if a weight is out of range, or layers are compared and differ in number or
                width. The message names the first problem.
        """
        for name, holds, otherwise in (
            ("alpha", lambda value: 0 <= value <= 1, "is not in [0, 1]"),
            ("temperature", lambda value: value > 0, "is not positive"),
            ("beta", lambda value: value >= 0, "is negative"),
        ):
            for value in getattr(self, name):
                if not holds(value):
                    raise ValueError(f"distill.{name}={value} {otherwise}")
        if not any(self.beta):
            return
        for name in ("depth", "width"):
            own, other = getattr(student, name), getattr(teacher, name)
            if own != other:
                raise ValueError(
                    f"the student has {name} {own} and the teacher {other}, so their layers cannot "
                    "be compared; set distill.beta=(0, 0)"
                )


class Teacher(NamedTuple):
    """A frozen model.

    Attributes:
        model: the decoder.
        variables: its collections "params", "pools" and "stats".
    """

    model: Decoder
    variables: Any


def towards(task: Task, teacher: Teacher, weights: Distillation, steps: int) -> Task:
    """Returns a task that trains the same model towards a teacher.

    The teacher computes its predictions for every batch. Its variables are frozen arrays of the
    task.

    Args:
        task: task with the student and the loss that the text alone gives.
        teacher: the teacher, with the student's vocabulary.
        weights: weights of the loss.
        steps: number of steps over which weights change.

    Raises:
        ValueError: if the weights or the models do not fit; see `Distillation.check`.
    """
    student = task.model.config
    weights.check(student, teacher.model.config)
    keeps = (OUTPUTS,) if any(weights.beta) else ()

    def loss(logits: Array, kept: Any, batch: Batch, frozen: Any, step: Array) -> Array:
        found, sown = teacher.model.apply(
            dequantize(frozen), *inputs_of(batch), mutable=list(keeps)
        )
        alpha, temperature, beta = (
            cosine(each, step, steps) for each in (weights.alpha, weights.temperature, weights.beta)
        )
        of_text = task.loss(logits, kept, batch, frozen, step)
        apart = temperature**2 * divergence(found, logits, temperature)
        total = alpha * apart + (1 - alpha) * of_text
        if not keeps:
            return total
        own = student.in_order(kept[OUTPUTS], "feed_forward")
        others = teacher.model.config.in_order(sown[OUTPUTS], "feed_forward")
        return total + beta * output_distance(own, others, batch["positions"])

    return task._replace(loss=loss, keeps=(*task.keeps, *keeps), frozen=teacher.variables)


def output_distance(
    student: Float[Array, "layers B L D"],
    teacher: Float[Array, "layers B L D"],
    positions: Int[Array, "B L"],
) -> Float[Array, "B L"]:
    """Returns the distance of feed-forward outputs of like-numbered layers, token by token.

    The mean over tokens is the mean over layers of `|y - y'|^2 / |y|^2`, where y is the teacher's
    output and the squares are summed over the batch. First positions are left out, because their
    activations can be very large.

    Args:
        student: outputs of the student's layers.
        teacher: outputs of the teacher's layers.
        positions: position of each token in its document.
    """
    student, teacher = (each.astype(jnp.float32) for each in (student, teacher))
    counts_BL = positions > 0
    size_NBL = jnp.sum(jnp.square(teacher), axis=-1) * counts_BL
    apart_NBL = jnp.sum(jnp.square(student - teacher), axis=-1) * counts_BL
    mean_size_N11 = jnp.mean(size_NBL, axis=(1, 2), keepdims=True)
    return jnp.mean(apart_NBL / mean_size_N11, axis=0)


def cosine(ends: Cosine, step: Int[Array, ""] | int, steps: int) -> Float[Array, ""]:
    """Returns the value at a step of a cosine from `ends[0]` at step 0 to `ends[1]` at `steps`."""
    first, last = ends
    part = jnp.minimum(jnp.asarray(step) / steps, 1)
    return last + (first - last) * (1 + jnp.cos(math.pi * part)) / 2
