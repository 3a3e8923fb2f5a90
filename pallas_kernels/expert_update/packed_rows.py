"""One step of packed rows as plain arrays: of experts of a pool, or of any matrix."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels.expert_update import integer_step
from pallas_kernels.expert_update.rule import (
    Hyperparameters,
    halve,
    move,
    precondition,
    rescale,
    step_rate,
)

ROW = (-2, -1)  # the axes of a row's columns: planes, and words


class RowNumbers(NamedTuple):
    """What is kept of each row beside its codes and accumulators."""

    scales: Float[Array, "*R"]
    moments: Float[Array, "*R"]
    scale_moments: Float[Array, "*R"]


class RowCounts(NamedTuple):
    """What a step did to each row; see `pallas_kernels.expert_update.Statistics`."""

    hit: Bool[Array, "*R"]
    clipped: Int[Array, "*R"]
    doubled: Bool[Array, "*R"]
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
    code_bits: int,
    bits: int,
) -> tuple[Int[Array, "*R planes W"], Int[Array, "*R planes W"], RowNumbers, RowCounts]:
    """Moves every row whose gradient is not zero; the others stay as they are.

    Args:
        codes: columns by plane, as words hold them.
        accumulators: zeros where `bits` is 0.
        gradient: of the weights.
        numbers: before the step.
        draw: random words, the same at every call: a hash is cheaper than memory.
        rule: hyperparameters.
        width: columns of a row; those beyond are padding, in which all is 0.
        code_bits: of a code.
        bits: of an accumulator.

    Returns:
        Codes, accumulators and numbers after the step, and counts of rows that were hit.
    """
    mean_square = jnp.sum(gradient * gradient, axis=ROW) / width
    hit = mean_square > 0

    # The integer step, with the old scale.
    moments, factor = precondition(mean_square, numbers.moments, rule.beta2)
    rate = step_rate(factor, numbers.scales, rule, bits)
    values = integer_step.join(codes, accumulators, bits)
    moved = move(values, gradient, jnp.expand_dims(rate, ROW), draw(), rule)

    # A row that would clip too much doubles its scale. This is rare, and chunks without such a row
    # pass it by.
    clips = integer_step.clips(moved, code_bits, bits)
    doubles = jnp.sum(clips, axis=ROW, dtype=jnp.float32) / width > rule.grow_above

    def halve_doubling(moved: Array) -> Array:
        return jnp.where(jnp.expand_dims(doubles, ROW), halve(moved, draw()), moved)

    moved = jax.lax.cond(jnp.any(doubles), halve_doubling, lambda moved: moved, moved)
    clipped = jnp.sum(integer_step.clips(moved, code_bits, bits), axis=ROW)
    moved = jnp.clip(moved, *integer_step.limits(code_bits, bits))
    new_codes, new_accumulators = integer_step.split(moved, bits)

    along_codes = jnp.sum(gradient * codes, axis=ROW)
    scales, scale_moments = rescale(
        numbers.scales, doubles, along_codes, numbers.scale_moments, rule
    )
    keep = jnp.expand_dims(hit, ROW)
    new = RowNumbers(scales, moments, scale_moments)
    return (
        jnp.where(keep, new_codes, codes),
        jnp.where(keep, new_accumulators, accumulators),
        RowNumbers(*[jnp.where(hit, n, o) for n, o in zip(new, numbers, strict=True)]),
        RowCounts(
            hit=hit,
            clipped=clipped * hit,
            doubled=doubles & hit,
            step_size=rate * jnp.sum(jnp.abs(gradient), axis=ROW) * hit,
        ),
    )
