"""Work around an update kernel: finding the lines that are hit, and updating their scales.

A line is a `row` in code; see `pallas_kernels.row_layout`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.expert_update.rule import Hyperparameters, is_hit, precondition, step_rate
from pallas_kernels.expert_update.xla import Carry
from pallas_kernels.row_layout import RowLayout
from pallas_kernels.sorted_pairs import SortedPairs


class SortedRows(NamedTuple):
    """Pairs of a layer, sorted by expert, and the lines of the pool that they hit.

    A line is rewritten at the last of its pairs. Numbers of a line are therefore kept by pair, and
    only those at the line's last pair count.

    Attributes:
        pairs: sorted pairs.
        row: line of each pair; meaningless where there is no expert.
        slot: place of the pair's expert in the line.
        is_last: whether the pair is the last one of its line.
        num_pairs: number of pairs that have an expert. They come first.
    """

    pairs: SortedPairs
    row: Int[Array, " P"]
    slot: Int[Array, " P"]
    is_last: Bool[Array, " P"]
    num_pairs: Int[Array, ""]

    @staticmethod
    def of(pairs: SortedPairs, layout: RowLayout) -> "SortedRows":
        """Finds the lines of sorted pairs."""
        size = pairs.token.shape[0]
        expert = pairs.expert[pairs.rank]
        row, num_pairs = expert // layout.experts, pairs.first[pairs.num_hit]
        is_kept = jnp.arange(size) < num_pairs
        follows = jnp.concatenate([row[1:], row[-1:]])
        is_final = jnp.arange(size) == num_pairs - 1
        is_last = is_kept & (is_final | (row != follows))
        return SortedRows(pairs, row, expert % layout.experts, is_last, num_pairs)

    def experts(self, layout: RowLayout) -> Int[Array, "experts P"]:
        """Returns the experts of each pair's line."""
        return self.row * layout.experts + jnp.arange(layout.experts)[:, None]


class RowSums(NamedTuple):
    """Sums of each line that a kernel returns, by slot, vector (`down`, `up`) and pair.

    Pairs are the last axis here and in related arrays, because a TPU pads a last dimension of two
    to 128.

    Attributes:
        mean_square: mean square of the gradient.
        magnitude: sum of the gradient's absolute values.
        factor: factor that the scale is multiplied by.
        stopped: number of values that went beyond the limits of codes.
    """

    mean_square: Float[Array, "experts 2 P"]
    magnitude: Float[Array, "experts 2 P"]
    factor: Float[Array, "experts 2 P"]
    stopped: Float[Array, "experts 2 P"]


def gather(
    array: Float[Array, "layers 2 N"], layer: Array, experts: Int[Array, "experts P"]
) -> Float[Array, "experts 2 P"]:
    """Returns the numbers of both vectors of experts; any numbers where there is no expert."""
    # Indexed by layer first, because XLA for TPUs would otherwise reorder the whole stack.
    return array[layer][jnp.arange(2)[:, None], experts[:, None]]


def finish(
    carry: Carry,
    layer: Array,
    rows: SortedRows,
    sums: RowSums,
    rule: Hyperparameters,
    layout: RowLayout,
) -> Carry:
    """Updates scales, second moments and statistics of a layer after its codes are rewritten."""
    experts = rows.experts(layout)
    scales, moments = (gather(array, layer, experts) for array in (carry.scales, carry.moments))
    hit = rows.is_last & is_hit(sums.mean_square)
    new_moments, by_root = precondition(sums.mean_square, moments, rule.beta2)
    step_size = step_rate(by_root, scales, rule, layout.bits) * sums.magnitude
    place = jnp.where(hit, experts[:, None], carry.moments.shape[-1])

    def put(array: Array, new: Array) -> Array:
        to = (jnp.arange(2)[:, None], place)
        own = array[layer].at[to].set(new, mode="drop", unique_indices=True)
        return jax.lax.dynamic_update_index_in_dim(array, own, layer, 0)

    def add(total: Array, each: Array) -> Array:
        return total.at[layer].add(jnp.sum(jnp.where(hit, each, 0), dtype=jnp.float32))

    statistics = carry.statistics
    return carry._replace(
        scales=put(carry.scales, scales * sums.factor),
        moments=put(carry.moments, new_moments),
        statistics=statistics._replace(
            experts=statistics.experts.at[layer].add(rows.pairs.num_hit.astype(jnp.float32)),
            rows=add(statistics.rows, jnp.ones_like(sums.factor)),
            clipped=add(statistics.clipped, sums.stopped),
            grown=add(statistics.grown, (sums.factor > 1).astype(jnp.float32)),
            step_size=add(statistics.step_size, step_size),
        ),
    )
