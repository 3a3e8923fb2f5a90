"""The update in plain XLA: always works, and is the reference for every kernel.

The (expert, token) pairs of a layer are sorted by expert. A loop walks the experts that were hit, a
chunk at a time: it sums each expert's row over its pairs in ascending order of tokens, and rewrites
the expert once, in place. Its cost depends on the pairs, not on N; its memory, on the chunk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import storage as layout
from pallas_kernels.counter_hash import hash_words
from pallas_kernels.expert_update import integer_step
from pallas_kernels.expert_update.rule import (
    Hyperparameters,
    Statistics,
    halve,
    move,
    precondition,
    rescale,
    step_rate,
)
from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.sorted_pairs import experts_of, num_chunks, row_sums, sort_pairs

# The purpose of random bits, absorbed by their hash: other uses take other numbers.
ROUNDING = 1
ROW = (-2, -1)  # the axes of a row's columns: planes, and words


class Carry(NamedTuple):
    """What the loop rewrites in place; every array has a leading axis of layers."""

    weights: Array
    scales: Any
    accumulators: Any
    moments: Float[Array, "layers 2 N"]
    scale_moments: Any
    statistics: Statistics


def update_stack(
    carry: Carry,
    gradient: FactoredGradient,
    rule: Hyperparameters,
    seed: Any,
    step: Any,
    *,
    num_experts: int,
    storage: str,
    chunk: int,
) -> Carry:
    """Applies one step to every layer of a stack, `chunk` experts at a time."""
    layers = gradient.ids.shape[0]

    def one_layer(layer: Array, carry: Carry) -> Carry:
        ids, c_down, c_up, x, dy = (leaf[layer] for leaf in gradient)
        pairs = sort_pairs(ids, c_down, c_up, num_experts)

        def one_chunk(index: Array, carry: Carry) -> Carry:
            expert = experts_of(pairs, index, chunk, num_experts)
            sums = row_sums(pairs, x, dy, index, chunk)
            rewrite = rewrite_packed if storage in layout.BITS else rewrite_floats
            return rewrite(carry, layer, expert, sums, rule, seed, step, storage)

        return jax.lax.fori_loop(0, num_chunks(pairs, chunk), one_chunk, carry)

    return jax.lax.fori_loop(0, layers, one_layer, carry)


def rewrite_packed(
    carry: Carry,
    layer: Array,
    expert: Int[Array, " C"],
    sums: Float[Array, "C 2 D"],
    rule: Hyperparameters,
    seed: Any,
    step: Any,
    storage: str,
) -> Carry:
    """One step of a chunk of packed experts, their columns by plane."""
    width, num_experts = sums.shape[-1], carry.moments.shape[-1]
    code_bits = layout.BITS[storage]
    bits = code_bits  # accumulators are packed like the codes
    valid = expert < num_experts
    safe = jnp.where(valid, expert, 0)
    matrix = jnp.arange(2)
    at = (layer, matrix, safe[:, None])

    codes, accumulators = (
        layout.read_planes(words, layer, safe, width, storage)
        for words in (carry.weights, carry.accumulators)
    )
    sums = sums.reshape(codes.shape)
    scales, moments, scale_moments = carry.scales[at], carry.moments[at], carry.scale_moments[at]
    mean_square = jnp.mean(sums * sums, axis=ROW)
    hit = valid[:, None] & (mean_square > 0)

    # The integer step, with the old scale.
    new_moments, factor = precondition(mean_square, moments, rule.beta2)
    values = integer_step.join(codes, accumulators, bits)
    rate = step_rate(factor, scales, rule, bits)
    step_size = rate * jnp.sum(jnp.abs(sums), axis=ROW)
    column = jnp.arange(width).reshape(codes.shape[2:])
    counters = (layer, jnp.expand_dims(matrix, ROW), jnp.expand_dims(safe, (1, 2, 3)), column)
    words = hash_words(seed, ROUNDING, step, *counters)
    moved = move(values, sums, jnp.expand_dims(rate, ROW), words, rule)

    # A row that would clip too much doubles its scale. This is rare, and chunks without such a row
    # pass it by.
    clips = integer_step.clips(moved, code_bits, bits)
    doubles = jnp.mean(clips, axis=ROW, dtype=jnp.float32) > rule.grow_above

    def halve_doubling(moved: Array) -> Array:
        words = hash_words(seed, ROUNDING, step, *counters)
        return jnp.where(jnp.expand_dims(doubles, ROW), halve(moved, words), moved)

    moved = jax.lax.cond(jnp.any(doubles), halve_doubling, lambda moved: moved, moved)
    stopped = jnp.sum(integer_step.clips(moved, code_bits, bits), axis=ROW)
    moved = jnp.clip(moved, *integer_step.limits(code_bits, bits))
    new_codes, new_accumulators = integer_step.split(moved, bits)

    along_codes = jnp.sum(sums * codes, axis=ROW)
    new_scales, new_scale_moments = rescale(scales, doubles, along_codes, scale_moments, rule)

    # Rows without a gradient stay as they are; places left over are dropped.
    keep = jnp.expand_dims(hit, ROW)
    new_codes = jnp.where(keep, new_codes, codes)
    new_accumulators = jnp.where(keep, new_accumulators, accumulators)
    place = jnp.where(valid, expert, -1)
    to = (layer, matrix, expert[:, None])

    def put(array: Array, new: Array, old: Array) -> Array:
        return array.at[to].set(jnp.where(hit, new, old), mode="drop", unique_indices=True)

    return Carry(
        layout.write_planes(carry.weights, layer, place, new_codes, storage),
        put(carry.scales, new_scales, scales),
        layout.write_planes(carry.accumulators, layer, place, new_accumulators, storage),
        put(carry.moments, new_moments, moments),
        put(carry.scale_moments, new_scale_moments, scale_moments),
        Statistics(
            experts=carry.statistics.experts.at[layer].add(jnp.sum(valid)),
            rows=carry.statistics.rows.at[layer].add(jnp.sum(hit)),
            clipped=carry.statistics.clipped.at[layer].add(jnp.sum(stopped * hit)),
            doubled=carry.statistics.doubled.at[layer].add(jnp.sum(doubles & hit)),
            step_size=carry.statistics.step_size.at[layer].add(jnp.sum(step_size * hit)),
        ),
    )


def rewrite_floats(
    carry: Carry,
    layer: Array,
    expert: Int[Array, " C"],
    sums: Float[Array, "C 2 D"],
    rule: Hyperparameters,
    seed: Any,
    step: Any,
    storage: str,
) -> Carry:
    """One step of a chunk of float experts under the same rule; bfloat16 rounds stochastically."""
    num_experts, width = carry.moments.shape[-1], sums.shape[-1]
    valid = expert < num_experts
    safe = jnp.where(valid, expert, 0)
    matrix = jnp.arange(2)
    weights = carry.weights[layer, safe].astype(jnp.float32)
    moments = carry.moments[layer, matrix, safe[:, None]]
    mean_square = jnp.mean(sums * sums, axis=-1)
    hit = valid[:, None] & (mean_square > 0)
    new_moments, factor = precondition(mean_square, moments, rule.beta2)
    steps = -rule.learning_rate * factor[..., None] * sums
    step_size = rule.learning_rate * factor * jnp.sum(jnp.abs(sums), axis=-1)
    steps = steps - rule.learning_rate * rule.weight_decay * weights
    steps = jnp.where(hit[..., None], steps, 0.0)
    new = weights + steps
    if storage == "bfloat16":
        counters = (layer, matrix[:, None], safe[:, None, None], jnp.arange(width))
        new = _round_to_bfloat16(new, hash_words(seed, ROUNDING, step, *counters))
    to = (layer, matrix, expert[:, None])
    statistics = carry.statistics
    return carry._replace(
        weights=carry.weights.at[layer, expert].set(
            new.astype(carry.weights.dtype), mode="drop", unique_indices=True
        ),
        moments=carry.moments.at[to].set(
            jnp.where(hit, new_moments, moments), mode="drop", unique_indices=True
        ),
        statistics=statistics._replace(
            experts=statistics.experts.at[layer].add(jnp.sum(valid)),
            rows=statistics.rows.at[layer].add(jnp.sum(hit)),
            step_size=statistics.step_size.at[layer].add(jnp.sum(step_size * hit)),
        ),
    )


def _round_to_bfloat16(value: Float[Array, "*S"], words: Array) -> Float[Array, "*S"]:
    """Rounds float32 to a neighbouring bfloat16 value, away from zero with the right probability.

    Adds 16 random bits below the 16 that are kept, and cuts them off.
    """
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
    rounded = (bits + (words >> 16)) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(rounded, jnp.float32)
