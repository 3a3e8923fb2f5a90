"""The rule of the update, applied to whole lines as a kernel holds them.

A few lines (`rows` in code) are `[planes, rows, lanes]` unpacked (`pallas_kernels.row_layout`). The
codes of `down` or of `up` of one expert are a *segment*. A sum over a segment is a column with one
number per line.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.counter_hash import absorb
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
from pallas_kernels.row_layout import RowLayout

COLUMNS = 128  # numbers of a line, side by side; as many as a register has lanes


def rewrite_rows(
    codes_words: Int[Array, "rows lanes"],
    accumulator_words: Int[Array, "rows lanes"],
    gradient: Float[Array, "planes rows lanes"],
    known: Float[Array, "rows 128"],
    prefix: list[Array],
    rule: Hyperparameters,
    layout: RowLayout,
) -> tuple[Array, Array, Array]:
    """Applies one step to some lines.

    Args:
        codes_words: words of the codes.
        accumulator_words: words of the accumulators.
        gradient: gradient of the weights, at the places of the codes; zeros for experts that are
            not hit.
        known: columns, side by side: scales by segment, second moments by segment, and the upper
            and the lower half of the line's number.
        prefix: hash of all counters before the expert's, of `down` and of `up`.
        rule: hyperparameters.
        layout: layout of the lines.

    Returns:
        The words after the step, and the fields of `RowSums` by segment, side by side.
    """
    segments, bits = 2 * layout.experts, layout.bits
    segment = segment_of_lanes(layout)
    width = layout.planes * layout.words

    def sums_of(values: Float[Array, "planes rows lanes"]) -> list[Float[Array, "rows 1"]]:
        by_lane = jnp.sum(values, axis=0)
        return [
            jnp.sum(jnp.where(segment == each, by_lane, 0.0), axis=1, keepdims=True)
            for each in range(segments)
        ]

    def on_lanes(columns: list[Float[Array, "rows 1"]]) -> Float[Array, "rows lanes"]:
        lanes = jnp.zeros((codes_words.shape[0], layout.lanes), jnp.float32)
        for each, column in enumerate(columns):
            lanes = jnp.where(segment == each, column, lanes)
        return lanes

    def column(index: int) -> Float[Array, "rows 1"]:
        return known[:, index : index + 1]

    scales = [column(index) for index in range(segments)]
    moments = [column(segments + index) for index in range(segments)]
    high, low = (column(2 * segments + half).astype(jnp.int32) for half in range(2))
    row = (high << 16) + low

    mean_square = [each / width for each in sums_of(gradient * gradient)]
    rates = []
    for square, moment, scale in zip(mean_square, moments, scales, strict=True):
        _, factor = precondition(square, moment, rule.beta2)
        rates.append(step_rate(factor, scale, rule, bits))
    codes, accumulators = (_unpack(each, layout) for each in (codes_words, accumulator_words))
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, layout.lanes), 1)
    plane = jax.lax.broadcasted_iota(jnp.int32, (layout.planes, 1, layout.lanes), 0)
    state = jnp.where(layout.vector_of(lane) == 0, prefix[0], prefix[1])
    state = absorb(state, row * layout.experts + layout.slot_of(lane))
    random = absorb(state[None], layout.column_of(plane, lane[None]))
    moved = move(
        integer_step.join(codes, accumulators, bits), gradient, on_lanes(rates)[None], random, rule
    )

    squares, outer, stopped = (sums_of(each) for each in summands(moved, layout.code, bits))
    factors = [
        rung(*each, width, layout.code, bits) for each in zip(squares, outer, stopped, strict=True)
    ]
    # Lanes without a segment must not divide by 0.
    by_lane = jnp.maximum(on_lanes(factors), 0.5)[None]
    moved = on_rung(moved, by_lane, random)
    moved = jnp.clip(moved, *integer_step.limits(layout.code, bits))
    new_codes, new_accumulators = integer_step.split(moved, bits)
    hit = on_lanes([is_hit(square).astype(jnp.float32) for square in mean_square])[None] > 0
    words = [
        _pack(jnp.where(hit, new, old), layout)
        for new, old in ((new_codes, codes), (new_accumulators, accumulators))
    ]
    magnitude = sums_of(jnp.abs(gradient))
    # The order is that of `RowSums`.
    sums = [*mean_square, *magnitude, *factors, *stopped]
    return words[0], words[1], _as_columns(sums)


def segment_of_lanes(layout: RowLayout) -> Int[Array, "1 lanes"]:
    """Returns the segment of each lane, `2 * slot + vector`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, layout.lanes), 1)
    return 2 * layout.slot_of(lane) + layout.vector_of(lane)


def _unpack(words: Int[Array, "rows lanes"], layout: RowLayout) -> Int[Array, "planes rows lanes"]:
    top = 32 - layout.bits
    return jnp.stack(
        [(words << (top - layout.bits * plane)) >> top for plane in range(layout.planes)]
    )


def _pack(codes: Int[Array, "planes rows lanes"], layout: RowLayout) -> Int[Array, "rows lanes"]:
    mask = (1 << layout.bits) - 1
    words = codes[0] & mask
    for plane in range(1, layout.planes):
        words = words | ((codes[plane] & mask) << (layout.bits * plane))
    return words


def _as_columns(columns: list[Float[Array, "rows 1"]]) -> Float[Array, "rows 128"]:
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, COLUMNS), 1)
    result = jnp.zeros((columns[0].shape[0], COLUMNS), jnp.float32)
    for index, column in enumerate(columns):
        result = jnp.where(lane == index, column, result)
    return result
