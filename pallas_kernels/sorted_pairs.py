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
        first: where each hit expert's pairs begin, and the number of pairs in places left over.
        num_hit: how many experts are hit.
    """

    token: Int[Array, " P"]
    c_down: Float[Array, " P"]
    c_up: Float[Array, " P"]
    rank: Int[Array, " P"]
    expert: Int[Array, " P"]
    first: Int[Array, " P+1"]
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
    ids, c_down, c_up = ids.reshape(pairs), c_down.reshape(pairs), c_up.reshape(pairs)
    keep = (ids >= 0) & (ids < num_experts) & ((c_down != 0) | (c_up != 0))
    key, order = jax.lax.sort_key_val(
        jnp.where(keep, ids, num_experts).astype(jnp.int32), jnp.arange(pairs, dtype=jnp.int32)
    )
    begins = jnp.concatenate([jnp.array([True]), key[1:] != key[:-1]]) & (key < num_experts)
    rank = jnp.cumsum(begins) - 1
    places = jnp.where(begins, rank, pairs)
    expert = jnp.full(pairs, num_experts, jnp.int32).at[places].set(key, mode="drop")
    kept = jnp.sum(keep, dtype=jnp.int32)
    first = jnp.full(pairs + 1, kept).at[places].set(jnp.arange(pairs), mode="drop")
    return SortedPairs(
        token=order // num_chosen,
        c_down=c_down[order],
        c_up=c_up[order],
        rank=rank.astype(jnp.int32),
        expert=expert,
        first=first.astype(jnp.int32),
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
    """The gradient rows (`down`, `up`) of the hit experts of one chunk, in float32."""
    block = 2 * size  # pairs at a time
    num_pairs, width = pairs.token.shape[0], x.shape[1]
    first_rank = chunk * size
    begin = pairs.first[jnp.minimum(first_rank, num_pairs)]
    end = pairs.first[jnp.minimum(first_rank + size, num_pairs)]

    def add_block(index: Array, sums: Array) -> Array:
        place = begin + index * block + jnp.arange(block)
        safe = jnp.minimum(place, num_pairs - 1)
        token = pairs.token[safe]
        row = jnp.where(place < end, pairs.rank[safe] - first_rank, size)
        down = pairs.c_down[safe][:, None] * x[token].astype(jnp.float32)
        up = pairs.c_up[safe][:, None] * dy[token].astype(jnp.float32)
        rows = jnp.stack([down, up], axis=1)
        return sums.at[row].add(rows, mode="drop", indices_are_sorted=True)

    blocks = (end - begin + block - 1) // block
    return jax.lax.fori_loop(0, blocks, add_block, jnp.zeros((size, 2, width), jnp.float32))
