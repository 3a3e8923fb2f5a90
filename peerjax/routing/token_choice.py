"""Token-choice routing of mixtures of experts: every token chooses its k best of E experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Limits of the rows of one multiplication. The largest number fills a matrix unit.
LARGEST_BLOCK, SMALLEST_BLOCK = 128, 8


class Slots(NamedTuple):
    """Places of (token, choice) pairs after they are sorted by expert and padded to blocks.

    Every expert has whole blocks of b slots, so that each block is multiplied by one expert. A slot
    without a pair is padding.

    Attributes:
        of_pair: the slot of each pair.
        pair: the pair t * k + j of each slot, or T * k in padding.
        expert: the expert of each block.
    """

    of_pair: Int[Array, "T k"]
    pair: Int[Array, " slots"]
    expert: Int[Array, " blocks"]


def gates_of(logits_TE: Float[Array, "*S E"], ids_Tk: Int[Array, "*S k"]) -> Float[Array, "*S k"]:
    """Returns the gates of the chosen experts: their probabilities, divided by their sum.

    This is the softmax over the chosen logits alone, as in Mixtral. With k = 1 it would always be
    1, and the router would get no gradient. The gate is then the probability itself, as in the
    Switch Transformer.

    Args:
        logits_TE: logits of the router, float32.
        ids_Tk: the experts that each token chose.

    References:
        Jiang et al., "Mixtral of Experts", arXiv:2401.04088, section 2.1; Zoph et al., "ST-MoE",
        arXiv:2202.08906, appendix D (top-n routing); Fedus et al., "Switch Transformers",
        arXiv:2101.03961, eq. 2.
    """
    chosen = jnp.take_along_axis(logits_TE, ids_Tk, axis=-1)
    if ids_Tk.shape[-1] == 1:
        return jnp.exp(chosen - jax.nn.logsumexp(logits_TE, axis=-1, keepdims=True))
    return jax.nn.softmax(chosen, axis=-1)


def balance_loss(logits_TE: Float[Array, "T E"], ids_Tk: Int[Array, "T k"]) -> Float[Array, ""]:
    """Returns `E * sum_i f_i P_i`, which is 1 if experts are used evenly, and at most E.

    f_i is the share of expert i in the T * k choices. No gradient flows through it. P_i is the mean
    probability of expert i. With k = 1 this is the loss of the Switch Transformer, which is
    multiplied by alpha there. Mixtral's code counts choices per token, so its loss is k times as
    large.

    References:
        Fedus et al., "Switch Transformers", arXiv:2101.03961, eq. 4 to 6.
    """
    shares_E = counts_of(ids_Tk, logits_TE.shape[-1]) / ids_Tk.size
    return balance_loss_at(jax.nn.softmax(logits_TE, axis=-1), shares_E)


def balance_loss_at(
    probabilities_TE: Float[Array, "T E"], shares_E: Float[Array, " E"]
) -> Float[Array, ""]:
    """Returns `E * sum_i f_i P_i` for given shares f, through which no gradient flows.

    With shares of earlier steps, the result is linear in the batch. It is then the same for any
    split of the batch, unlike the product of two figures of one batch.
    """
    fixed = jax.lax.stop_gradient(shares_E)
    return shares_E.size * jnp.sum(fixed * jnp.mean(probabilities_TE, axis=0))


def counts_of(ids: Int[Array, "..."], num_experts: int) -> Int[Array, " E"]:
    """Returns how often each expert occurs."""
    return jnp.sum(ids.reshape(-1, 1) == jnp.arange(num_experts), axis=0, dtype=jnp.int32)


def block_size(pairs: int, num_experts: int) -> int:
    """Returns the number of slots of a block.

    It is a power of two near a quarter of the average number of pairs of an expert. Padding is then
    about an eighth of the work.
    """
    quarter = max(1, pairs // (4 * num_experts))
    return min(max(1 << (quarter.bit_length() - 1), SMALLEST_BLOCK), LARGEST_BLOCK)


def sorted_slots(ids: Int[Array, "T k"], num_experts: int, block: int) -> Slots:
    """Sorts the pairs by expert and pads the pairs of each expert to whole blocks.

    No pair is dropped. The number of blocks is the largest that any choice of experts can need.
    Blocks that this choice does not need are padding of the last expert.

    Args:
        ids: the experts that each token chose.
        num_experts: E, number of experts.
        block: slots of a block.
    """
    flat = ids.reshape(-1)
    pairs = flat.size
    num_blocks = (pairs + min(num_experts, pairs) * (block - 1)) // block
    counts = counts_of(flat, num_experts)
    blocks = -(-counts // block)
    last_block = jnp.cumsum(blocks)
    order = jnp.argsort(flat, stable=True)
    by_expert = flat[order]
    # The place of each sorted pair among the pairs of its expert, and then its slot.
    place = jnp.arange(pairs) - (jnp.cumsum(counts) - counts)[by_expert]
    slot = (last_block - blocks)[by_expert] * block + place
    expert = jnp.searchsorted(last_block, jnp.arange(num_blocks), side="right")
    return Slots(
        of_pair=jnp.zeros_like(flat).at[order].set(slot).reshape(ids.shape),
        pair=jnp.full(num_blocks * block, pairs, jnp.int32).at[slot].set(order),
        expert=jnp.minimum(expert, num_experts - 1),
    )
