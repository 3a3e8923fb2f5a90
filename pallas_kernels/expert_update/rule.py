"""The row-wise rule: what every implementation of the update computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels.codes import Code
from pallas_kernels.counter_hash import round_stochastically
from pallas_kernels.expert_update import integer_step

EPSILON = 1e-12


class Hyperparameters(NamedTuple):
    """Numbers of the rule; all may be traced.

    Attributes:
        learning_rate: RMS of a row's step, in units of the weights.
        weight_decay: of hit rows, times the learning rate.
        beta2: decay of second moments, each time a row is hit.
    """

    learning_rate: Any
    weight_decay: Any = 0.0
    beta2: Any = 0.99


class Statistics(NamedTuple):
    """Counts of one update, by layer.

    Attributes:
        experts: experts hit.
        rows: vectors (`down` or `up`) with a gradient that is finite.
        clipped: values that went beyond the limits of codes, to stop there unless their row's scale
            made room.
        grown: rows whose scale went up a rung to make room.
        step_size: sum over the weights of hit rows of |step|, without the part of weight decay, in
            units of the accumulator (packed pools) or of the weight (float pools).
    """

    experts: Float[Array, " layers"]
    rows: Float[Array, " layers"]
    clipped: Float[Array, " layers"]
    grown: Float[Array, " layers"]
    step_size: Float[Array, " layers"]


def is_hit(mean_square: Float[Array, "*C"]) -> Bool[Array, "*C"]:
    """Which rows move: those with a gradient, unless it, or its square, is not finite."""
    return (mean_square > 0) & (mean_square < jnp.inf)


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


def summands(
    moved: Int[Array, "*S"], code: Code, bits: int
) -> tuple[Float[Array, "*S"], Float[Array, "*S"], Float[Array, "*S"]]:
    """What `rung` wants the sums of, over the values of each row.

    Returns:
        Squares; squares of the outer values, which at a scale two rungs lower would be beyond the
        limits of codes; and 1 for those that are beyond them now.
    """
    squares = jnp.square(moved.astype(jnp.float32))
    limit = integer_step.limits(code, bits)[1] / integer_step.RUNG**2
    stops = jnp.where(integer_step.clips(moved, code, bits), 1.0, 0.0)
    return squares, jnp.where(squares > limit**2, squares, 0.0), stops


def rung(
    square_sum: Float[Array, "*C"],
    outer: Float[Array, "*C"],
    stops: Float[Array, "*C"],
    width: int,
    code: Code,
    bits: int,
) -> Float[Array, "*C"]:
    """What a row's scale is multiplied by: a rung, 1 or its inverse.

    A scale follows the RMS of its row, so that codes make the most of their range while weights
    grow and shrink. It moves once the RMS of the codes is more than a rung from where it should be:
    a row stays a rung away from moving back. A row of zeros keeps its scale, or it would go down to
    0 while nothing moves the row.

    Where few values are most of a row, an RMS says nothing of them: as if the others were noise,
    codes would clip away what the row is, step by step. While outer values hold half of the sum of
    squares the scale does not go down, and it goes up if values that stop do.

    Args:
        square_sum: of the row's values, in units of the accumulator.
        outer: likewise, of outer values (`summands`).
        stops: how many are beyond the limits of codes.
        width: of the row.
        code: format of the codes.
        bits: of an accumulator.
    """
    wanted = width * integer_step.spread(code, bits) ** 2
    ratio, held = integer_step.RUNG, integer_step.HELD * square_sum
    small = (square_sum > 0) & (square_sum < wanted / ratio**2) & (outer < held)
    least = stops * float(integer_step.limits(code, bits)[1]) ** 2  # that those stopped hold
    large = (square_sum > wanted * ratio**2) | (least > held)
    return jnp.where(large, ratio, jnp.where(small, 1 / ratio, 1.0))


def on_rung(
    moved: Int[Array, "*S"], factor: Float[Array, "..."], words: UInt[Array, "*S"]
) -> Int[Array, "*S"]:
    """The values of a row whose scale is multiplied by a factor, rounded stochastically.

    The random bits are the lowest eight of the words, centred; `move` uses the upper 24.
    """
    lowest = (words << 24) + jnp.uint32(1 << 23)
    return round_stochastically(moved.astype(jnp.float32) / factor, lowest).astype(jnp.int32)
