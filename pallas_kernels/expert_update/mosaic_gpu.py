"""The update for NVIDIA GPUs.

The (token, expert) pairs of a layer are sorted by expert. A block of 128 threads processes each
line (a `row` in code) that is hit. It sums the line's gradient over its pairs in registers, in
float32 and in ascending order of tokens. It reads, rewrites and stores codes and accumulators once,
with one word per thread. No other block touches the line. Lines that are not hit are never touched.
As for the TPU kernel, XLA gathers and scatters scales and second moments. For this the kernel
returns sums over each line.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.codes import why_no_kernel_updates
from pallas_kernels.counter_hash import Purpose, absorb, hash_words
from pallas_kernels.expert_update import integer_step
from pallas_kernels.expert_update.rows import RowSums, SortedRows, finish, gather
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
from pallas_kernels.expert_update.xla import Carry, Part
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.pallas_compat import InterpretGPUParams, rewrite_in_place
from pallas_kernels.row_layout import RowLayout
from pallas_kernels.sorted_pairs import sort_pairs
from pallas_kernels.storage import UNIT, ExpertPool

MAX_LANES = 1152  # nine words per thread


def cannot_update(
    pool: ExpertPool, gradient: FactoredGradient, accumulator_bits: int
) -> str | None:
    """Returns why the kernel cannot do this update, or `None` if it can."""
    del gradient
    if not pool.is_packed:
        return f"it rewrites packed pools, not {pool.storage}"
    if why := why_no_kernel_updates(pool.storage, accumulator_bits):
        return why
    lanes = RowLayout.of(pool.width, pool.storage).lanes
    if lanes > MAX_LANES:
        return f"at width {pool.width}, a line of {lanes} words does not fit in registers"
    return None


def update_stack(
    carry: Carry,
    gradient: FactoredGradient,
    rule: Hyperparameters,
    seed: Any,
    step: Any,
    part: Part,
    *,
    num_experts: int,
    storage: str,
    accumulator_bits: int,
    interpret: Any = False,
) -> Carry:
    """Does the same as `pallas_kernels.expert_update.xla.update_stack`."""
    del accumulator_bits  # they are as wide as the codes; see `cannot_update`
    count, _, width = gradient.x.shape
    layout = RowLayout.of(width, storage)
    interpret = InterpretGPUParams() if interpret is True else interpret

    def one_layer(number: Array, carry: Carry) -> Carry:
        layer = part.first_layer + number
        ids, c_down, c_up, x, dy = (leaf[number] for leaf in gradient)
        rows = SortedRows.of(sort_pairs(ids, c_down, c_up, num_experts), layout)
        prefix = hash_words(seed, Purpose.POOL_STEP, step, layer, jnp.arange(2))
        images = layout.joined(x, dy).astype(jnp.float32)
        codes, accumulators, sums = _rewrite(
            carry, layer, rows, images, rule, prefix, part, layout, interpret
        )
        carry = carry._replace(weights=codes, accumulators=accumulators)
        return finish(carry, layer, rows, sums, rule, layout)

    return jax.lax.fori_loop(0, count, one_layer, carry)


def _rewrite(
    carry: Carry,
    layer: Array,
    rows: SortedRows,
    images: Float[Array, "T planes lanes"],
    rule: Hyperparameters,
    prefix: Array,
    part: Part,
    layout: RowLayout,
    interpret: Any,
) -> tuple[Array, Array, RowSums]:
    """Rewrites codes and accumulators in place. Returns them, and the sums of each line."""
    size, segments = rows.row.shape[0], 2 * layout.experts
    place = jnp.where(rows.is_last, jnp.cumsum(rows.is_last) - 1, size)
    last_of = jnp.zeros(size, jnp.int32).at[place].set(jnp.arange(size), mode="drop")
    first_of = jnp.concatenate([jnp.zeros(1, jnp.int32), last_of[:-1] + 1])
    experts = rows.experts(layout)
    known = jnp.stack([gather(each, layer, experts) for each in (carry.scales, carry.moments)])
    lane = jnp.arange(layout.lanes, dtype=jnp.int32)
    slot, vector = layout.slot_of(lane), layout.vector_of(lane)
    inputs = (
        jnp.stack([layer, jnp.sum(rows.is_last), part.first_expert]).astype(jnp.int32),
        jnp.stack([jnp.asarray(each, jnp.float32) for each in rule]),
        jnp.stack([slot, 2 * slot + vector, layout.column_of(jnp.int32(0), lane)]),
        jax.lax.bitcast_convert_type(jnp.where(vector == 0, prefix[0], prefix[1]), jnp.int32),
        jnp.stack([first_of, last_of]),
        jnp.stack([rows.pairs.token, rows.slot, rows.row]),
        jnp.stack([rows.pairs.c_down, rows.pairs.c_up]),
        known.reshape(2, segments, size),
        images,
    )
    results = jnp.zeros((len(RowSums._fields), segments, size), jnp.float32)

    *_, codes, accumulators, sums = rewrite_in_place(
        functools.partial(_kernel, layout=layout),
        (*inputs, carry.weights, carry.accumulators, results),
        grid=(size,),
        grid_names=("row",),
        interpret=interpret,
    )
    sums = sums.reshape(len(RowSums._fields), layout.experts, 2, size)
    return codes, accumulators, RowSums(*sums)


def _kernel(
    scalars_ref,
    rule_ref,
    lanes_ref,
    prefix_ref,
    ends_ref,
    integers_ref,
    coefficients_ref,
    known_ref,
    images_ref,
    codes_ref,
    accumulators_ref,
    sums_ref,
    *,
    layout,
):
    number, planes, bits = jax.lax.axis_index("row"), range(layout.planes), layout.bits
    segments, width = range(2 * layout.experts), layout.planes * layout.words

    @pl.when(number < scalars_ref[1])
    def _():
        rule = Hyperparameters(*[rule_ref[index] for index in range(len(Hyperparameters._fields))])
        slot, segment, column = (lanes_ref[index] for index in range(3))
        first, last = ends_ref[0, number], ends_ref[1, number]

        def sum_of(values, each):
            total = functools.reduce(jnp.add, values)
            return jnp.sum(jnp.where(segment == each, total, 0.0))

        def on_lanes(numbers):
            lanes = (0 * slot).astype(jnp.float32)
            for each, value in zip(segments, numbers, strict=True):
                lanes = jnp.where(segment == each, value, lanes)
            return lanes

        def add_pair(pair, gradient):
            token, own = integers_ref[0, pair], 2 * integers_ref[1, pair]
            up = jnp.where(segment == own + 1, coefficients_ref[1, pair], 0.0)
            both = jnp.where(segment == own, coefficients_ref[0, pair], up)
            return tuple(
                total + both * images_ref[token, plane]
                for total, plane in zip(gradient, planes, strict=True)
            )

        zeros = tuple((0 * slot).astype(jnp.float32) for _ in planes)
        gradient = jax.lax.fori_loop(first, last + 1, add_pair, zeros)

        layer, row = scalars_ref[0], integers_ref[2, last]
        at = (layer, pl.ds(row * layout.units, layout.units))
        top = 32 - bits
        codes, accumulators = (
            [(words << (top - bits * plane)) >> top for plane in planes]
            for words in (ref[at].reshape(layout.lanes) for ref in (codes_ref, accumulators_ref))
        )
        mean_square = [sum_of([each * each for each in gradient], s) / width for s in segments]
        rates = []
        for each, square in zip(segments, mean_square, strict=True):
            _, factor = precondition(square, known_ref[1, each, last], rule.beta2, _sqrt)
            rates.append(step_rate(factor, known_ref[0, each, last], rule, bits))
        rate = on_lanes(rates)
        expert = scalars_ref[2] + row * layout.experts + slot
        state = absorb(prefix_ref[...].astype(jnp.uint32), expert)
        random = [absorb(state, column + plane * layout.words) for plane in planes]
        moved = [
            move(integer_step.join(code, accumulator, bits), sums, rate, word, rule)
            for code, accumulator, sums, word in zip(
                codes, accumulators, gradient, random, strict=True
            )
        ]

        by_plane = zip(*(summands(each, layout.code, bits) for each in moved), strict=True)
        squares, outer, stopped = ([sum_of(each, s) for s in segments] for each in by_plane)
        factors = [
            rung(*each, width, layout.code, bits)
            for each in zip(squares, outer, stopped, strict=True)
        ]

        def to_new_scales(moved):
            # Lanes without a segment must not divide by 0.
            by_lane = jnp.maximum(on_lanes(factors), 0.5)
            return [on_rung(each, by_lane, word) for each, word in zip(moved, random, strict=True)]

        # Few scales move, so most lines skip this.
        moves = functools.reduce(jnp.logical_or, [factor != 1 for factor in factors])
        moved = jax.lax.cond(moves, to_new_scales, lambda moved: moved, moved)
        hit = on_lanes([jnp.where(is_hit(square), 1.0, 0.0) for square in mean_square]) > 0
        low, high = integer_step.limits(layout.code, bits)
        new = [integer_step.split(jnp.clip(each, low, high), bits) for each in moved]
        for which, (ref, old) in enumerate(((codes_ref, codes), (accumulators_ref, accumulators))):
            kept = [jnp.where(hit, pair[which], own) for pair, own in zip(new, old, strict=True)]
            mask = (1 << bits) - 1
            words = [
                (each & mask) << (bits * plane) for each, plane in zip(kept, planes, strict=True)
            ]
            ref[at] = functools.reduce(jnp.bitwise_or, words).reshape(layout.units, UNIT)

        magnitude = [jnp.abs(each) for each in gradient]
        for each in segments:
            fields = RowSums(
                mean_square[each],
                sum_of(magnitude, each),
                factors[each],
                stopped[each],
            )
            for field, value in enumerate(fields):
                sums_ref[field, each, last] = value


def _sqrt(square: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Returns the square root, to a unit in the last place or less.

    Pallas lowers no square root for GPUs. This is one step of Newton's method from the approximate
    reciprocal root that GPUs have.
    """
    safe = jnp.maximum(square, jnp.float32(1e-37))
    root = safe * jax.lax.rsqrt(safe)
    return jnp.where(square > 0, 0.5 * (root + safe / root), 0.0)
