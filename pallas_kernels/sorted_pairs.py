"""The (expert, token) pairs of a layer, sorted by expert, and the gradient vectors they sum to.

Hit experts are processed in chunks. The cost depends on the number of pairs, and the memory on the
size of a chunk. Neither depends on N.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class SortedPairs(NamedTuple):
    """The pairs of one layer, sorted by expert, and the experts that occur in them.

    Attributes:
        token: token of each pair.
        c_down: coefficient of each pair for `down`.
        c_up: coefficient of each pair for `up`.
        rank: index of each pair's expert among the hit experts, ascending.
        expert: hit experts, ascending; the sentinel N in unused places.
        first: index of the first pair of each hit expert. The places after the last expert hold the
            number of pairs that are kept. Only the very last place may differ, and it is not read.
        rest: indices of the pairs that are not the first of their expert, in order.
        num_hit: number of hit experts.
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
    """Sorts the pairs of one layer by expert. Tokens of one expert stay in ascending order.

    Pairs do not count if their id is outside [0, N) or both of their coefficients are zero. They
    come last, with the sentinel as their expert.
    """
    num_chosen, pairs = ids.shape[1], ids.size
    ids, c_down, c_up = (each.reshape(pairs) for each in (ids, c_down, c_up))
    ids = ids.astype(jnp.int32)  # the sentinel fits in int32
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
    # There are rank + 1 first pairs before pair p, so its place in the rest is p - rank - 1.
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
    """Returns how many chunks of `size` experts hold the hit experts."""
    return (pairs.num_hit + size - 1) // size


def experts_of(
    pairs: SortedPairs, chunk: Int[Array, ""], size: int, num_experts: int
) -> Int[Array, " size"]:
    """Returns the hit experts of one chunk, and N in unused places."""
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
    """Returns the float32 gradients of `down` and `up` of the hit experts of one chunk.

    The first pair of every expert is read in one sweep. The other pairs are added in blocks, with
    the tokens of each expert in ascending order. They are few where few tokens hit each expert.
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
        """Returns how many pairs of lower rank are not the first of their expert."""
        rank = jnp.minimum(rank, pairs.num_hit)
        return pairs.first[rank] - rank

    begin, end = rest_before(first_rank), rest_before(first_rank + size)

    def add_block(index: Array, sums: Array) -> Array:
        place = begin + index * block + jnp.arange(block)
        pair = pairs.rest[jnp.minimum(place, num_pairs - 1)]
        row = jnp.where(place < end, pairs.rank[pair] - first_rank, size)
        return sums.at[row].add(rows_of(pair), mode="drop", indices_are_sorted=True)

    return jax.lax.fori_loop(0, (end - begin + block - 1) // block, add_block, sums)
