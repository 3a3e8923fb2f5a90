"""The rule that every implementation of the update computes, for each vector.

A vector is `down` or `up` of an expert, or a row of a packed matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels.codes import Code
from pallas_kernels.counter_hash import round_stochastically
from pallas_kernels.expert_update import integer_step

EPSILON = 1e-12


class Hyperparameters(NamedTuple):
    """Numbers of the rule. All of them may be traced.

    Attributes:
        learning_rate: RMS of a vector's step, in units of the weights.
        weight_decay: decay of vectors that are hit, which is multiplied by the learning rate.
        beta2: decay of second moments, each time a vector is hit.
    """

    learning_rate: Any
    weight_decay: Any = 0.0
    beta2: Any = 0.99


class Statistics(NamedTuple):
    """Counts of one update, by layer.

    Attributes:
        experts: number of experts hit.
        rows: number of vectors (`down` or `up`) with a gradient that is finite and not zero.
        clipped: number of values that went beyond the limits of codes. They stop there unless the
            scale of their vector went up.
        grown: number of vectors whose scale went up a rung.
        step_size: sum of |step| over the weights of hit vectors, without the part of weight decay.
            The unit is that of the accumulator (packed pools) or of the weight (float pools).
    """

    experts: Float[Array, " layers"]
    rows: Float[Array, " layers"]
    clipped: Float[Array, " layers"]
    grown: Float[Array, " layers"]
    step_size: Float[Array, " layers"]


def is_hit(mean_square: Float[Array, "*C"]) -> Bool[Array, "*C"]:
    """Returns which vectors move: those with a gradient, unless it or its square is not finite."""
    return (mean_square > 0) & (mean_square < jnp.inf)


def precondition(
    mean_square: Float[Array, "*C"],
    moments: Float[Array, "*C"],
    beta2: Any,
    sqrt: Callable[[Array], Array] = jnp.sqrt,
) -> tuple[Float[Array, "*C"], Float[Array, "*C"]]:
    """Returns the lazy second moment, and the factor from a gradient to a step of RMS <= 1.

    A moment of 0 means "never hit", and the first gradient sets it. There is no global bias
    correction. With it, a vector that is first hit late would take a step many times too large.
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
    """Returns the values of packed vectors after a step, before anything clips.

    Args:
        values: codes joined with their accumulators.
        sums: gradients of the vectors.
        rate: `step_rate` of each vector.
        words: random bits.
        rule: hyperparameters.
    """
    steps = -rate * sums - rule.learning_rate * rule.weight_decay * values
    return values + round_stochastically(integer_step.bounded(steps), words).astype(jnp.int32)


def step_rate(
    factor: Float[Array, "*C"], scales: Float[Array, "*C"], rule: Hyperparameters, bits: int
) -> Float[Array, "*C"]:
    """Returns by how many units of the accumulator a gradient of 1 moves a vector."""
    return rule.learning_rate * factor / scales * 2.0**bits


def summands(
    moved: Int[Array, "*S"], code: Code, bits: int
) -> tuple[Float[Array, "*S"], Float[Array, "*S"], Float[Array, "*S"]]:
    """Returns the arrays that `rung` takes sums of, over the values of each vector.

    Outer values are those that would be beyond the limits of codes at a scale two rungs lower.

    Returns:
        Squares of all values, squares of outer values, and 1 for values beyond the limits now.
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
    """Returns the factor that a vector's scale is multiplied by: a rung, 1 or an inverse rung.

    A scale follows the RMS of its vector, so that codes use most of their range while weights grow
    and shrink. It moves once the RMS of the codes is more than a rung from its target. A vector
    thus stays a rung away from moving back. A vector of zeros keeps its scale. Otherwise the scale
    would go down to 0 while nothing moves the vector.

    Where few values are most of a vector, its RMS does not describe them. If the scale followed the
    RMS alone, codes would clip these values away, step by step. While outer values hold half of the
    sum of squares, the scale does not go down. It goes up if values beyond the limits hold half.

    Args:
        square_sum: sum of the squares of the vector's values, in units of the accumulator.
        outer: sum of the squares of outer values (`summands`), in the same units.
        stops: number of values beyond the limits of codes.
        width: width of the vector.
        code: format of the codes.
        bits: bits of an accumulator.
    """
    wanted = width * integer_step.spread(code, bits) ** 2
    ratio, held = integer_step.RUNG, integer_step.HELD * square_sum
    small = (square_sum > 0) & (square_sum < wanted / ratio**2) & (outer < held)
    least = stops * float(integer_step.limits(code, bits)[1]) ** 2  # least that these values hold
    large = (square_sum > wanted * ratio**2) | (least > held)
    return jnp.where(large, ratio, jnp.where(small, 1 / ratio, 1.0))


def on_rung(
    moved: Int[Array, "*S"], factor: Float[Array, "..."], words: UInt[Array, "*S"]
) -> Int[Array, "*S"]:
    """Returns a vector's values once its scale is multiplied by a factor, rounded stochastically.

    The random bits are the lowest eight of the words, centred. `move` uses the upper 24.
    """
    lowest = (words << 24) + jnp.uint32(1 << 23)
    return round_stochastically(moved.astype(jnp.float32) / factor, lowest).astype(jnp.int32)
