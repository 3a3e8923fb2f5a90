"""The update in plain XLA. It always works, and is the reference for every kernel.

The (expert, token) pairs of a layer are sorted by expert. A loop processes the experts that are
hit, a chunk at a time. It sums the gradient of each expert over its pairs in ascending order of
tokens, and rewrites the expert once, in place. The cost depends on the number of pairs and not on
N. The memory depends on the size of a chunk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt16

from pallas_kernels import storage as layout
from pallas_kernels.codes import CODES
from pallas_kernels.counter_hash import Purpose, hash_words
from pallas_kernels.expert_update.packed_rows import ROW, RowCounts, RowNumbers, step_rows
from pallas_kernels.expert_update.rule import Hyperparameters, Statistics, is_hit, precondition
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.platforms import by_platform
from pallas_kernels.sorted_pairs import experts_of, num_chunks, row_sums, sort_pairs


class Part(NamedTuple):
    """Place of the rewritten experts in a larger stack, as integers that may be traced.

    Attributes:
        first_layer: layer of the stack that the first layer of the gradient is of.
        first_expert: number of the first expert of the arrays in the whole pool. Random bits depend
            on the number there.
    """

    first_layer: Any = 0
    first_expert: Any = 0


class Carry(NamedTuple):
    """Arrays that the loop rewrites in place. Every array has a leading axis of layers."""

    weights: Array
    scales: Any
    accumulators: Any
    moments: Float[Array, "layers 2 N"]
    statistics: Statistics


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
    chunk: int,
) -> Carry:
    """Applies one step to every layer of a gradient, `chunk` experts at a time."""

    def one_layer(number: Array, carry: Carry) -> Carry:
        layer = part.first_layer + number
        ids, c_down, c_up, x, dy = (leaf[number] for leaf in gradient)
        pairs = sort_pairs(ids, c_down, c_up, num_experts)

        def one_chunk(index: Array, carry: Carry) -> Carry:
            expert = experts_of(pairs, index, chunk, num_experts)
            sums = row_sums(pairs, x, dy, index, chunk)
            operands = (carry, layer, expert, sums, rule, seed, step, part.first_expert, storage)
            if storage in CODES:
                return rewrite_packed(*operands, accumulator_bits)
            return rewrite_floats(*operands)

        return jax.lax.fori_loop(0, num_chunks(pairs, chunk), one_chunk, carry)

    def all_layers(carry: Carry) -> Carry:
        return jax.lax.fori_loop(0, gradient.ids.shape[0], one_layer, carry)

    def as_integers(carry: Carry) -> Carry:
        carry = carry._replace(weights=_bits_as(jnp.uint16, carry.weights))
        carry = all_layers(carry)
        return carry._replace(weights=_bits_as(jnp.bfloat16, carry.weights))

    if storage != "bfloat16":
        return all_layers(carry)
    # For every chunk, XLA for CPUs scatters bfloat16 through a float32 copy of the whole pool. It
    # scatters integers in place.
    return by_platform(carry, cpu=as_integers, default=all_layers)


def rewrite_packed(
    carry: Carry,
    layer: Array,
    expert: Int[Array, " C"],
    sums: Float[Array, "C 2 D"],
    rule: Hyperparameters,
    seed: Any,
    step: Any,
    first_expert: Any,
    storage: str,
    accumulator_bits: int,
) -> Carry:
    """Applies one step to a chunk of packed experts."""
    width, num_experts = sums.shape[-1], carry.moments.shape[-1]
    valid = expert < num_experts
    safe = jnp.where(valid, expert, 0)
    matrix = jnp.arange(2)
    at = (layer, matrix, safe[:, None])

    codes = layout.read_planes(carry.weights, layer, safe, width, storage)
    if accumulator_bits:
        kind = layout.accumulators_of(accumulator_bits)
        accumulators = layout.read_planes(carry.accumulators, layer, safe, width, kind)
        accumulators = accumulators.reshape(codes.shape)
    else:
        accumulators = jnp.zeros_like(codes)
    column = jnp.arange(width).reshape(codes.shape[2:])
    numbers_in_pool = jnp.expand_dims(first_expert + safe, (1, 2, 3))
    counters = (layer, jnp.expand_dims(matrix, ROW), numbers_in_pool, column)
    codes, accumulators, numbers, counts = step_rows(
        codes,
        accumulators,
        sums.reshape(codes.shape),
        RowNumbers(carry.scales[at], carry.moments[at]),
        lambda: hash_words(seed, Purpose.POOL_STEP, step, *counters),
        rule,
        width=width,
        code=CODES[storage],
        bits=accumulator_bits,
    )

    # Unused places are dropped.
    place = jnp.where(valid, expert, -1)
    to = (layer, matrix, expert[:, None])

    def put(array: Array, new: Array) -> Array:
        return array.at[to].set(new, mode="drop", unique_indices=True)

    new_accumulators = carry.accumulators
    if accumulator_bits:
        planes = accumulators.reshape(*codes.shape[:2], 32 // accumulator_bits, -1)
        new_accumulators = layout.write_planes(new_accumulators, layer, place, planes, kind)
    return Carry(
        layout.write_planes(carry.weights, layer, place, codes, storage),
        put(carry.scales, numbers.scales),
        new_accumulators,
        put(carry.moments, numbers.moments),
        add_counts(carry.statistics, layer, valid, counts),
    )


def rewrite_floats(
    carry: Carry,
    layer: Array,
    expert: Int[Array, " C"],
    sums: Float[Array, "C 2 D"],
    rule: Hyperparameters,
    seed: Any,
    step: Any,
    first_expert: Any,
    storage: str,
) -> Carry:
    """Applies one step of the same rule to a chunk of float experts.

    bfloat16 weights are rounded stochastically. The weights of a bfloat16 pool may be given as
    their bits in uint16, and are then returned as bits.
    """
    num_experts, width = carry.moments.shape[-1], sums.shape[-1]
    as_bits = carry.weights.dtype == jnp.uint16
    valid = expert < num_experts
    safe = jnp.where(valid, expert, 0)
    matrix = jnp.arange(2)
    rows = carry.weights[layer, safe]
    weights = (_bits_as(jnp.bfloat16, rows) if as_bits else rows).astype(jnp.float32)
    moments = carry.moments[layer, matrix, safe[:, None]]
    mean_square = jnp.mean(sums * sums, axis=-1)
    hit = valid[:, None] & is_hit(mean_square)
    new_moments, factor = precondition(mean_square, moments, rule.beta2)
    steps = -rule.learning_rate * factor[..., None] * sums
    step_size = rule.learning_rate * factor * jnp.sum(jnp.abs(sums), axis=-1)
    steps = steps - rule.learning_rate * rule.weight_decay * weights
    steps = jnp.where(hit[..., None], steps, 0.0)
    new = weights + steps
    if storage == "bfloat16":
        numbers = (first_expert + safe)[:, None, None]
        counters = (layer, matrix[:, None], numbers, jnp.arange(width))
        bits = _round_to_bfloat16(new, hash_words(seed, Purpose.POOL_STEP, step, *counters))
        new = bits if as_bits else _bits_as(jnp.bfloat16, bits)
    to = (layer, matrix, expert[:, None])
    counts = RowCounts(
        hit=hit,
        clipped=jnp.zeros_like(step_size),
        grown=jnp.zeros_like(hit),
        step_size=jnp.where(hit, step_size, 0.0),
    )
    return carry._replace(
        weights=carry.weights.at[layer, expert].set(new, mode="drop", unique_indices=True),
        moments=carry.moments.at[to].set(
            jnp.where(hit, new_moments, moments), mode="drop", unique_indices=True
        ),
        statistics=add_counts(carry.statistics, layer, valid, counts),
    )


def add_counts(
    statistics: Statistics, layer: Array, valid: Bool[Array, " C"], counts: RowCounts
) -> Statistics:
    """Adds the counts of a chunk of experts to the statistics of a layer."""
    more = Statistics(valid, counts.hit, counts.clipped, counts.grown, counts.step_size)
    return jax.tree.map(lambda total, each: total.at[layer].add(jnp.sum(each)), statistics, more)


def _round_to_bfloat16(value: Float[Array, "*S"], words: Array) -> UInt16[Array, "*S"]:
    """Rounds stochastically to a neighbouring bfloat16, and returns its bits.

    Adds 16 random bits below the 16 bits that are kept, and cuts them off. The neighbour away from
    zero thus has the right probability.
    """
    return ((_bits_as(jnp.uint32, value) + (words >> 16)) >> 16).astype(jnp.uint16)


def _bits_as(kind: Any, array: Array) -> Array:
    """Returns an array with the same bits, read as another type of the same size."""
    return jax.lax.bitcast_convert_type(array, kind)
