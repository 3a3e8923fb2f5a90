"""The (expert, token) pairs of a layer, sorted by expert, and the gradient rows they sum to.

Hit experts are walked a chunk at a time, so that cost depends on the pairs and memory on the chunk,
and neither on N.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class SortedPairs(NamedTuple):
    """The pairs of one layer, sorted by expert, and the experts that occur in them.

    Attributes:
        token: the token of each pair.
        c_down: its coefficients.
        c_up: likewise.
        rank: which of the hit experts each pair belongs to, ascending.
        expert: the experts hit, ascending; the sentinel N in places left over.
        first: where each hit expert's pairs begin; after the last, the number of pairs that are
            kept, in all places but the very last, which is not read.
        rest: the pairs that are not the first of their expert, in order.
        num_hit: how many experts are hit.
    """

    token: Int[Array, " P"]
    c_down: Float[Array, " P"]
    c_up: Float[Array, " P"]
    rank: Int[Array, " P"]
    expert: Int[Array, " P"]
    first: Int[Array, " P+1"]
    rest: Int[Array, " P"]
    num_hit: Int[Array, ""]


def sort_pairs(
    ids: Int[Array, "T K"],
    c_down: Float[Array, "T K"],
    c_up: Float[Array, "T K"],
    num_experts: int,
) -> SortedPairs:
    """Sorts the pairs of one layer by expert; tokens of one expert stay in ascending order.

    Pairs whose id is outside [0, N) or whose coefficients are both zero are left out: they come
    last, as the sentinel.
    """
    num_chosen, pairs = ids.shape[1], ids.size
    ids, c_down, c_up = (each.reshape(pairs) for each in (ids, c_down, c_up))
    ids = ids.astype(jnp.int32)  # which the sentinel fits in
    keep = (ids >= 0) & (ids < num_experts) & ((c_down != 0) | (c_up != 0))
    key, order = jax.lax.sort_key_val(
        jnp.where(keep, ids, num_experts), jnp.arange(pairs, dtype=jnp.int32)
    )
    begins = jnp.concatenate([jnp.array([True]), key[1:] != key[:-1]]) & (key < num_experts)
    rank = jnp.cumsum(begins) - 1
    places = jnp.where(begins, rank, pairs)
    expert = jnp.full(pairs, num_experts, jnp.int32).at[places].set(key, mode="drop")
    kept = jnp.sum(keep, dtype=jnp.int32)
    first = jnp.full(pairs + 1, kept).at[places].set(jnp.arange(pairs), mode="drop")
    # Before pair p lie rank + 1 first pairs, so that p comes at place p - rank - 1 of the rest.
    index = jnp.arange(pairs)
    place = jnp.where(begins | (key >= num_experts), pairs, index - rank - 1)
    rest = jnp.zeros(pairs, jnp.int32).at[place].set(index, mode="drop", unique_indices=True)
    return SortedPairs(
        token=order // num_chosen,
        c_down=c_down[order],
        c_up=c_up[order],
        rank=rank.astype(jnp.int32),
        expert=expert,
        first=first.astype(jnp.int32),
        rest=rest,
        num_hit=jnp.sum(begins, dtype=jnp.int32),
    )


def num_chunks(pairs: SortedPairs, size: int) -> Int[Array, ""]:
    """How many chunks of `size` experts hold the hit experts."""
    return (pairs.num_hit + size - 1) // size


def experts_of(
    pairs: SortedPairs, chunk: Int[Array, ""], size: int, num_experts: int
) -> Int[Array, " size"]:
    """The numbers of the hit experts of one chunk; N in places left over."""
    place = chunk * size + jnp.arange(size)
    expert = pairs.expert[jnp.minimum(place, pairs.expert.shape[0] - 1)]
    return jnp.where(place < pairs.num_hit, expert, num_experts)


def row_sums(
    pairs: SortedPairs,
    x: Float[Array, "T D"],
    dy: Float[Array, "T D"],
    chunk: Int[Array, ""],
    size: int,
) -> Float[Array, "size 2 D"]:
    """The gradient rows (`down`, `up`) of the hit experts of one chunk, in float32.

    The first pair of every expert is read in one sweep; what is left, little where experts are hit
    by few tokens, is added in blocks, each expert's tokens in ascending order.
    """
    num_pairs = pairs.token.shape[0]
    block = max(1, size // 2)

    def rows_of(pair: Int[Array, " B"]) -> Float[Array, "B 2 D"]:
        token = pairs.token[pair]
        down = pairs.c_down[pair][:, None] * x[token].astype(jnp.float32)
        up = pairs.c_up[pair][:, None] * dy[token].astype(jnp.float32)
        return jnp.stack([down, up], axis=1)

    first_rank = chunk * size
    rank = first_rank + jnp.arange(size)
    first = pairs.first[jnp.minimum(rank, num_pairs)]
    hit = (rank < pairs.num_hit)[:, None, None]
    sums = jnp.where(hit, rows_of(jnp.minimum(first, num_pairs - 1)), 0.0)

    def rest_before(rank: Array) -> Array:
        """How many pairs of lower rank are not the first of their expert."""
        rank = jnp.minimum(rank, pairs.num_hit)
        return pairs.first[rank] - rank

    begin, end = rest_before(first_rank), rest_before(first_rank + size)

    def add_block(index: Array, sums: Array) -> Array:
        place = begin + index * block + jnp.arange(block)
        pair = pairs.rest[jnp.minimum(place, num_pairs - 1)]
        row = jnp.where(place < end, pairs.rank[pair] - first_rank, size)
        return sums.at[row].add(rows_of(pair), mode="drop", indices_are_sorted=True)

    return jax.lax.fori_loop(0, (end - begin + block - 1) // block, add_block, sums)
