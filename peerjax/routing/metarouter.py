"""A metarouter: it chooses metaexperts for each token or, causally, for whole chunks of documents.

A metaexpert is a router with a pool of its own. The probabilities of a token are
`p_t = softmax(W x_t)` over the M metaexperts. For chunks, the mean of p over the earlier tokens of
the document takes the place of p_t. So a token never depends on later ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.counter_hash import Purpose, hash_words
from peerjax.routing.auxiliary import EXPERT_IDS
from peerjax.routing.token_choice import gates_of

# The metaexperts of every token, best first, and their gates.
Chosen = tuple[Int[Array, "*S k"], Float[Array, "*S k"]]


def chunk_starts(positions: Int[Array, "*S"], chunk: int, switch: bool) -> Int[Array, "*S"]:
    """Returns the position in its document at which each token's chunk begins.

    Args:
        positions: position of each token in its document.
        chunk: tokens of a chunk.
        switch: whether there are more than two chunks. Otherwise the second one lasts to the end of
            the document.
    """
    number = positions // chunk
    return (number if switch else jnp.minimum(number, 1)) * chunk


def running_sums(
    values_BLM: Float[Array, "B L M"], positions_BL: Int[Array, "B L"]
) -> Float[Array, "B L M"]:
    """Sums from the first token of a document to each token, that token included."""

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        (begun, before), (begins, value) = left, right
        return begun | begins, jnp.where(begins[..., None], value, before + value)

    first = (positions_BL == 0, values_BLM)
    return jax.lax.associative_scan(join, first, axis=1)[1]


def continued_sums(
    sums_BSM: Float[Array, "B S M"],
    values_BLM: Float[Array, "B L M"],
    positions_BL: Int[Array, "B L"],
) -> Float[Array, "B S M"]:
    """Returns running sums by position, with those of further tokens of each document.

    Args:
        sums_BSM: sums at the positions before, as of an earlier call. Later ones are not read.
        values_BLM: values of the further tokens.
        positions_BL: their positions, one after the other.
    """
    begin_B1 = positions_BL[:, :1]
    before = jnp.take_along_axis(sums_BSM, jnp.maximum(begin_B1 - 1, 0)[..., None], axis=1)
    sums_BLM = jnp.where(begin_B1[..., None] > 0, before, 0) + jnp.cumsum(values_BLM, axis=1)
    return sums_BSM.at[jnp.arange(len(positions_BL))[:, None], positions_BL].set(sums_BLM)


def means_before(
    sums_BPM: Float[Array, "B P M"],
    places_BL: Int[Array, "B L"],
    counts_BL: Int[Array, "B L"],
    otherwise_M: Float[Array, " M"],
) -> Float[Array, "B L M"]:
    """Returns the mean over the first tokens of a document, for each token.

    Args:
        sums_BPM: running sums at places in a sequence.
        places_BL: place of the last token of the mean.
        counts_BL: number of tokens of the mean.
        otherwise_M: the result for a mean of no tokens.
    """
    sums_BLM = jnp.take_along_axis(sums_BPM, jnp.maximum(places_BL, 0)[..., None], axis=1)
    means_BLM = sums_BLM / jnp.maximum(counts_BL, 1)[..., None]
    return jnp.where(counts_BL[..., None] > 0, means_BLM, otherwise_M)


def choose_by_means(
    means: Float[Array, "*S M"], k: int, removed: Bool[Array, " M"] | None = None
) -> Chosen:
    """Returns the metaexperts with the largest means, and their `gates_of_means`.

    Args:
        means: mean probabilities of each token's chunk.
        k: number of metaexperts to choose.
        removed: metaexperts to leave out. If fewer than k are left, the gates of others are 0.
    """
    if removed is not None:
        means = jnp.where(removed, 0, means)
    chosen = checkpoint_name(best(means, k), EXPERT_IDS)
    return chosen, _of_the_left(gates_of_means(means, chosen), chosen, removed)


def choose_by_logits(
    logits: Float[Array, "*S M"],
    k: int,
    removed: Bool[Array, " M"] | None = None,
    is_open: Bool[Array, "*S M"] | None = None,
) -> Chosen:
    """Returns the metaexperts with the largest logits, and their gates as in a mixture of MLPs.

    Args:
        logits: logits of the metarouter for each token.
        k: number of metaexperts to choose.
        removed: metaexperts to leave out. If fewer than k are left, the gates of others are 0.
        is_open: metaexperts to choose from, at least k of each token; `None` for all.
    """
    lowest, scores = jnp.finfo(logits.dtype).min, logits
    if removed is not None:
        scores = jnp.where(removed, lowest, scores)
    if is_open is not None:
        scores = jnp.where(is_open, scores, lowest)
    chosen = checkpoint_name(best(scores, k), EXPERT_IDS)
    return chosen, _of_the_left(gates_of(logits, chosen), chosen, removed)


def _of_the_left(gates: Array, chosen: Array, removed: Array | None) -> Array:
    return gates if removed is None else jnp.where(removed[chosen], 0, gates)


def best(scores_TM: Float[Array, "*S M"], k: int) -> Int[Array, "*S k"]:
    """Returns the k metaexperts with the largest scores, best first. No gradient flows."""
    flat = jax.lax.stop_gradient(scores_TM).reshape(-1, scores_TM.shape[-1])
    return jax.lax.top_k(flat, k)[1].reshape(*scores_TM.shape[:-1], k)


def gates_of_means(means: Float[Array, "*S M"], chosen: Int[Array, "*S k"]) -> Float[Array, "*S k"]:
    """Returns the means of the chosen metaexperts, divided by their sum.

    With k = 1 the value is 1. The divisor then has no gradient, so that the router learns.
    """
    own = jnp.take_along_axis(means, chosen, axis=-1)
    total = jnp.sum(own, axis=-1, keepdims=True)
    if chosen.shape[-1] == 1:
        total = jax.lax.stop_gradient(total)
    return own / jnp.where(total == 0, 1, total)


def opened_counts(
    seed: Int[Array, ""],
    step: Int[Array, ""],
    rows_B: Int[Array, " B"],
    segments_BL: Int[Array, "B L"],
    least: int,
    most: int,
) -> Int[Array, "B L"]:
    """Draws how many metaexperts each document opens, uniformly from `least` to `most`.

    Args:
        seed: seed of the run.
        step: number of the training step.
        rows_B: number of each sequence in the training text. A draw thus does not depend on how a
            batch is split.
        segments_BL: number of the document in its sequence that each token belongs to.
        least: the smallest count.
        most: the largest count.
    """
    words = hash_words(Purpose.OPENED, seed, step, rows_B[:, None], segments_BL)
    return least + (words % jnp.uint32(most - least + 1)).astype(jnp.int32)


def switches(
    chosen_BLk: Int[Array, "B L k"], positions_BL: Int[Array, "B L"], chunk: int
) -> tuple[Bool[Array, "B L"], Bool[Array, "B L"]]:
    """Marks tokens at which a chunk other than a document's first begins, and changes there.

    Returns:
        A mask of these tokens, and a mask of those with another set of metaexperts than the token
        before them.
    """
    begins_BL = (positions_BL % chunk == 0) & (positions_BL > 0)
    own = jnp.sort(chosen_BLk, axis=-1)
    before = jnp.roll(own, 1, axis=1)
    return begins_BL, begins_BL & jnp.any(own != before, axis=-1)
