"""The row-wise rule: what every implementation of the update computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels.counter_hash import round_stochastically
from pallas_kernels.expert_update import integer_step

EPSILON = 1e-12


class Hyperparameters(NamedTuple):
    """Numbers of the rule; all may be traced.

    Attributes:
        learning_rate: RMS of a row's step, in units of the weights.
        scale_learning_rate: size of a step of a scale's logarithm.
        weight_decay: of hit rows, times the learning rate.
        beta2: decay of second moments, each time a row is hit.
        grow_above: share of clipping codes above which a row doubles its scale.
    """

    learning_rate: Any
    scale_learning_rate: Any
    weight_decay: Any = 0.0
    beta2: Any = 0.99
    grow_above: Any = 0.02


class Statistics(NamedTuple):
    """Counts of one update, by layer.

    Attributes:
        experts: experts hit.
        rows: vectors (`down` or `up`) with a gradient.
        clipped: codes that stopped at their limit.
        doubled: rows whose scale doubled to make room.
        step_size: sum over the weights of hit rows of |step|, without the part of weight decay, in
            units of the accumulator (packed pools) or of the weight (float pools).
    """

    experts: Float[Array, " layers"]
    rows: Float[Array, " layers"]
    clipped: Float[Array, " layers"]
    doubled: Float[Array, " layers"]
    step_size: Float[Array, " layers"]


def precondition(
    mean_square: Float[Array, "*C"],
    moments: Float[Array, "*C"],
    beta2: Any,
    sqrt: Callable[[Array], Array] = jnp.sqrt,
) -> tuple[Float[Array, "*C"], Float[Array, "*C"]]:
    """The lazy second moment, and the factor that turns a gradient into a step of RMS <= 1.

    A moment of 0 means "never hit": the first gradient sets it. There is no global bias
    correction: a row first hit late would take a step many times too large.
    """
    decayed = beta2 * moments + (1 - beta2) * mean_square
    new = jnp.where(moments == 0, mean_square, decayed)
    root = sqrt(new) + EPSILON
    return new, 1.0 / jnp.maximum(root, sqrt(mean_square))


def move(
    values: Int[Array, "*S"],
    sums: Float[Array, "*S"],
    rate: Float[Array, "..."],
    words: UInt[Array, "*S"],
    rule: Hyperparameters,
) -> Int[Array, "*S"]:
    """Where a step takes the values of packed rows, before anything clips.

    Args:
        values: codes joined with their accumulators.
        sums: the gradient rows.
        rate: `step_rate` of each row.
        words: random bits.
        rule: hyperparameters.
    """
    steps = -rate * sums - rule.learning_rate * rule.weight_decay * values
    return values + round_stochastically(integer_step.bounded(steps), words).astype(jnp.int32)


def step_rate(
    factor: Float[Array, "*C"], scales: Float[Array, "*C"], rule: Hyperparameters, bits: int
) -> Float[Array, "*C"]:
    """Units of the accumulator that a gradient of 1 moves a row by."""
    return rule.learning_rate * factor / scales * 2.0**bits


def halve(moved: Int[Array, "*S"], words: UInt[Array, "*S"]) -> Int[Array, "*S"]:
    """The values of a row whose scale doubles: v / 2, rounded stochastically.

    The random bit is the lowest of the word; `move` uses the upper 24.
    """
    return (moved + (words & 1).astype(jnp.int32)) >> 1


def rescale(
    scales: Float[Array, "*C"],
    doubles: Bool[Array, "*C"],
    along_codes: Float[Array, "*C"],
    moments: Float[Array, "*C"],
    rule: Hyperparameters,
) -> tuple[Float[Array, "*C"], Float[Array, "*C"]]:
    """The scales after a step in log space, and the second moments of their gradient.

    Args:
        scales: before the step.
        doubles: which rows double theirs.
        along_codes: the product of each row's gradient with its codes.
        moments: of the scales' gradient.
        rule: hyperparameters.
    """
    gradient = scales * along_codes
    new_moments, factor = precondition(gradient * gradient, moments, rule.beta2)
    grown = jnp.where(doubles, 2.0, 1.0) * scales
    return grown * jnp.exp(-rule.scale_learning_rate * factor * gradient), new_moments
