"""One step of packed vectors (`rows` in code) as plain arrays.

A vector here is `down` or `up` of an expert, or a row of any matrix.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels.codes import Code
from pallas_kernels.expert_update import integer_step
from pallas_kernels.expert_update.rule import (
    Hyperparameters,
    is_hit,
    move,
    on_rung,
    precondition,
    rung,
    step_rate,
    summands,
)

ROW = (-2, -1)  # axes of a vector's columns: planes, and words


class RowNumbers(NamedTuple):
    """Numbers that are kept of each vector beside its codes and accumulators."""

    scales: Float[Array, "*R"]
    moments: Float[Array, "*R"]


class RowCounts(NamedTuple):
    """Effects of a step on each vector; see `pallas_kernels.expert_update.Statistics`."""

    hit: Bool[Array, "*R"]
    clipped: Float[Array, "*R"]
    grown: Bool[Array, "*R"]
    step_size: Float[Array, "*R"]


def step_rows(
    codes: Int[Array, "*R planes W"],
    accumulators: Int[Array, "*R planes W"],
    gradient: Float[Array, "*R planes W"],
    numbers: RowNumbers,
    draw: Callable[[], UInt[Array, "*R planes W"]],
    rule: Hyperparameters,
    *,
    width: int,
    code: Code,
    bits: int,
) -> tuple[Int[Array, "*R planes W"], Int[Array, "*R planes W"], RowNumbers, RowCounts]:
    """Moves every vector whose gradient is finite and not zero. The others stay as they are.

    Args:
        codes: codes with columns by plane, as words hold them.
        accumulators: accumulators with columns by plane; zeros where `bits` is 0.
        gradient: gradient of the weights.
        numbers: numbers before the step.
        draw: function that returns random words, the same at every call. Hashing again costs less
            than keeping them in memory.
        rule: hyperparameters.
        width: columns of a vector. Columns beyond are padding, in which everything is 0.
        code: format of the codes.
        bits: bits of an accumulator.

    Returns:
        Codes, accumulators and numbers after the step, and counts of vectors that were hit.
    """
    mean_square = jnp.sum(gradient * gradient, axis=ROW) / width
    hit = is_hit(mean_square)

    # The integer step, with the old scale.
    moments, by_root = precondition(mean_square, numbers.moments, rule.beta2)
    rate = step_rate(by_root, numbers.scales, rule, bits)
    values = integer_step.join(codes, accumulators, bits)
    moved = move(values, gradient, jnp.expand_dims(rate, ROW), draw(), rule)

    # Few scales move, and chunks in which none moves skip this.
    square_sum, outer, stops = (jnp.sum(each, axis=ROW) for each in summands(moved, code, bits))
    factor = jnp.where(hit, rung(square_sum, outer, stops, width, code, bits), 1.0)

    def to_new_scales(moved: Array) -> Array:
        return on_rung(moved, jnp.expand_dims(factor, ROW), draw())

    moved = jax.lax.cond(jnp.any(factor != 1), to_new_scales, lambda moved: moved, moved)
    moved = jnp.clip(moved, *integer_step.limits(code, bits))
    new_codes, new_accumulators = integer_step.split(moved, bits)
    keep = jnp.expand_dims(hit, ROW)
    new = RowNumbers(numbers.scales * factor, moments)
    return (
        jnp.where(keep, new_codes, codes),
        jnp.where(keep, new_accumulators, accumulators),
        RowNumbers(*[jnp.where(hit, n, o) for n, o in zip(new, numbers, strict=True)]),
        RowCounts(
            hit=hit,
            clipped=jnp.where(hit, stops, 0.0),
            grown=factor > 1,
            step_size=jnp.where(hit, rate * jnp.sum(jnp.abs(gradient), axis=ROW), 0.0),
        ),
    )
