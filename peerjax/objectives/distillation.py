"""Distillation: training towards the predictions and layer outputs of a frozen teacher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peerjax.model import Decoder, ModelConfig
from peerjax.objectives.soft_targets import (
    TEMPERATURES,
    SoftTargets,
    divergence,
    divergence_from_likeliest,
    soft_targets,
)
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
        top_k: number of the teacher's likeliest tokens that the divergence tells apart. All others
            are one class, and T is the value of `TEMPERATURES` that is nearest to the cosine.
            `None` means all tokens.

    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.
    """

    alpha: Cosine
    temperature: Cosine
    beta: Cosine
    top_k: int | None = None

    @property
    def reads_outputs(self) -> bool:
        """Whether the loss reads the outputs of layers."""
        return any(self.beta)

    def check(self, student: ModelConfig, teacher: ModelConfig) -> None:
        """Checks the weights, and that the models have layers to compare.

        Raises:
            ValueError: if a value is out of range, the vocabularies differ, or layers are compared
                and differ in number or width. The message names the first problem.
        """
        for name, holds, otherwise in (
            ("alpha", lambda value: 0 <= value <= 1, "is not in [0, 1]"),
            ("temperature", lambda value: value > 0, "is not positive"),
            ("beta", lambda value: value >= 0, "is negative"),
        ):
            ends = getattr(self, name)
            if len(ends) != 2:
                raise ValueError(f"distill.{name}={ends} is not a pair, the first and last value")
            for value in ends:
                if not holds(value):
                    raise ValueError(f"distill.{name}={value} {otherwise}")
        if self.top_k is not None:
            self._check_top_k(self.top_k, teacher.vocab_size)
        if student.vocab_size != teacher.vocab_size:
            raise ValueError(
                f"the student has a vocabulary of {student.vocab_size} tokens and the teacher one "
                f"of {teacher.vocab_size}; train both with one tokenizer"
            )
        for name in ("depth", "width") if self.reads_outputs else ():
            own, other = getattr(student, name), getattr(teacher, name)
            if own != other:
                raise ValueError(
                    f"the student has {name} {own} and the teacher {other}, so their layers cannot "
                    "be compared; set distill.beta=(0, 0)"
                )

    def _check_top_k(self, top_k: int, vocab_size: int) -> None:
        if not 0 < top_k < vocab_size:
            raise ValueError(
                f"distill.top_k={top_k} is not in [1, {vocab_size}), the size of the vocabulary"
            )
        for value in self.temperature:
            if value not in TEMPERATURES:
                raise ValueError(
                    f"distill.temperature={value} is not one of {', '.join(map(str, TEMPERATURES))}"
                    ", at which the mass of unlikely tokens is known; choose one of them, or leave "
                    "distill.top_k out"
                )


class Prediction(NamedTuple):
    """What a teacher predicts for a batch.

    Attributes:
        tokens: logits [B, L, V], or soft targets [B, L].
        outputs: outputs of its feed-forward layers [layers, B, L, D], or `None`.
    """

    tokens: Array | SoftTargets
    outputs: Array | None


class Teacher(Protocol):
    """A source of predictions."""

    @property
    def frozen(self) -> Any:
        """Arrays that `predict` reads."""

    @property
    def rows(self) -> Callable[[Any], Any] | None:
        """Function that adds fields to rows of text, as in `Task`."""

    def predict(self, batch: Batch, frozen: Any, weights: Distillation) -> Prediction:
        """Returns predictions for a batch, with outputs of layers if `weights` reads them."""


class LiveTeacher(NamedTuple):
    """A frozen model that computes its predictions for every batch.

    Attributes:
        model: the decoder.
        frozen: its collections "params", "pools" and "stats".
        rows: no fields are added to rows.
    """

    model: Decoder
    frozen: Any
    rows: None = None

    def predict(self, batch: Batch, frozen: Any, weights: Distillation) -> Prediction:
        """Applies the model to a batch."""
        return predictions(self.model, frozen, batch, weights.top_k, weights.reads_outputs)


def predictions(
    model: Decoder, variables: Any, batch: Batch, top_k: int | None, with_outputs: bool
) -> Prediction:
    """Returns the predictions of a model for a batch.

    Args:
        model: the decoder.
        variables: its collections "params", "pools" and "stats".
        batch: rows of text.
        top_k: number of likely tokens of soft targets; `None` for logits.
        with_outputs: whether to return the outputs of feed-forward layers too.
    """
    keeps = [OUTPUTS] if with_outputs else []
    logits, sown = model.apply(dequantize(variables), *inputs_of(batch), mutable=keeps)
    outputs = model.config.in_order(sown[OUTPUTS], "feed_forward") if keeps else None
    return Prediction(logits if top_k is None else soft_targets(logits, top_k), outputs)


def towards(task: Task, teacher: Teacher, weights: Distillation, steps: int) -> Task:
    """Returns a task that trains the same model towards a teacher.

    Args:
        task: task with the student and the loss that the text alone gives.
        teacher: the teacher, for which `weights` were checked.
        weights: weights of the loss.
        steps: number of steps over which weights change.
    """
    student = task.model.config
    keeps = (OUTPUTS,) if weights.reads_outputs else ()

    def loss(logits: Array, kept: Any, batch: Batch, frozen: Any, step: Array) -> Array:
        predicted = teacher.predict(batch, frozen, weights)
        alpha, beta = (cosine(each, step, steps) for each in (weights.alpha, weights.beta))
        of_text = task.loss(logits, kept, batch, frozen, step)
        total = alpha * _softened(predicted.tokens, logits, weights, step, steps)
        total += (1 - alpha) * of_text
        if predicted.outputs is None:
            return total
        own = student.in_order(kept[OUTPUTS], "feed_forward")
        return total + beta * output_distance(own, predicted.outputs, batch["positions"])

    return task._replace(
        loss=loss, keeps=(*task.keeps, *keeps), frozen=teacher.frozen, rows=teacher.rows
    )


def _softened(
    teacher: Array | SoftTargets, logits: Array, weights: Distillation, step: Array, steps: int
) -> Float[Array, "B L"]:
    """Returns `T^2 KL(teacher || student)` at the temperature of a step."""
    temperature = cosine(weights.temperature, step, steps)
    if not isinstance(teacher, SoftTargets):
        return temperature**2 * divergence(teacher, logits, temperature)
    levels = jnp.array(TEMPERATURES)
    level = jnp.argmin(jnp.abs(levels - temperature))
    return levels[level] ** 2 * divergence_from_likeliest(teacher, logits, level)


def output_distance(
    student: Float[Array, "layers B L D"],
    teacher: Float[Array, "layers B L D"],
    positions: Int[Array, "B L"],
) -> Float[Array, "B L"]:
    """Returns the distance of feed-forward outputs of like-numbered layers, token by token.

    The mean over tokens is the mean over layers of `|y - y'|^2 / |y|^2`, where y is the teacher's
    output and the squares are summed over the batch. First positions are left out, because their
    activations can be very large. A layer without any other output counts as 0.

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
    return jnp.mean(apart_NBL / jnp.where(mean_size_N11 > 0, mean_size_N11, 1), axis=0)


def cosine(ends: Cosine, step: Int[Array, ""] | int, steps: int) -> Float[Array, ""]:
    """Returns the value at a step of a cosine from `ends[0]` at step 0 to `ends[1]` at `steps`."""
    first, last = ends
    part = jnp.minimum(jnp.asarray(step) / steps, 1)
    return last + (first - last) * (1 + jnp.cos(math.pi * part)) / 2
