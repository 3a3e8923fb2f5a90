"""Product-key scores of many metaexperts, computed only for the metaexperts that tokens chose.

Pairs of a token and a chosen metaexpert are sorted by metaexpert into padded blocks, as in a
mixture of MLPs. Each block is multiplied by the weights of one metaexpert.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from peerjax.routing.choice import Choice
from peerjax.routing.expert_blocks import expert_dot, from_slots, to_slots
from peerjax.routing.product_keys import retrieve, spread_ids
from peerjax.routing.token_choice import Slots, block_size, sorted_slots
from peerjax.sharding.over_mesh import over_mesh
from peerjax.sharding.product_keys import BY_HEAD
from peerjax.sharding.rules import BATCH

EPSILON = 1e-6  # of the normalisation of queries, as in `flax.linen.LayerNorm`


class Routers(NamedTuple):
    """The weights of the routers of all metaexperts.

    Attributes:
        query: maps a token to the queries of all heads, each with a half for either side.
        keys1: first sub-keys of every head.
        keys2: second sub-keys of every head.
        norm: scale and bias of the layer normalisation of queries; `None` for none.
    """

    query: Float[Array, "M D F"]
    keys1: Float[Array, "M H N1 d"]
    keys2: Float[Array, "M H N2 d"]
    norm: tuple[Float[Array, "M F/H"], Float[Array, "M F/H"]] | None = None

    @property
    def num_experts(self) -> int:
        """N, number of experts of a metaexpert."""
        return self.keys1.shape[2] * self.keys2.shape[2]


def choose_in_metaexperts(
    x_TD: Float[Array, "T D"],
    chosen_Tj: Int[Array, "T j"],
    gates_Tj: Float[Array, "T j"],
    routers: Routers,
    k: int,
    *,
    spread: int = 1,
    implementation: str | None = None,
) -> Choice:
    """Lets each chosen metaexpert retrieve its k best experts for every head.

    Args:
        x_TD: inputs of the routers, float32.
        chosen_Tj: the metaexperts of each token, all different.
        gates_Tj: their gates, with which the gates of their experts are multiplied.
        routers: the routers of all M metaexperts.
        k: number of experts that a head retrieves.
        spread: V of `spread_ids`, within a metaexpert and in the pool of all.
        implementation: implementation of product keys and of the products in blocks.

    Returns:
        A choice of j H k experts for each token, metaexpert by metaexpert, in the pool of M N
        experts. `Choice.moved` gives their numbers there.

    Raises:
        ValueError: if a metaexpert has fewer than k experts.
    """
    score = partial(scores_of_chosen, implementation=implementation)
    specs = (BATCH, BATCH, jax.tree.map(lambda _: P(), routers))
    scores1_HSN, scores2_HSN, slots = over_mesh(score, specs, (BY_HEAD, BY_HEAD, BATCH))(
        x_TD, chosen_Tj, routers
    )
    of_slots, _ = retrieve(scores1_HSN, scores2_HSN, k, implementation).choose()
    gates_TjK = over_mesh(from_slots, (BATCH, BATCH), BATCH)(of_slots.gates, slots)
    ids_TjK = over_mesh(_ids_of_pairs, (BATCH, BATCH), BATCH)(of_slots.ids, slots)
    keys = routers.keys1.shape[2], routers.keys2.shape[2]
    own = Choice(spread_ids(ids_TjK, keys, spread), gates_TjK, routers.num_experts)
    total = routers.query.shape[0] * routers.num_experts
    moved = own.moved(chosen_Tj, total, spread)
    tokens = chosen_Tj.shape[0]
    gates_TjK = moved.gates * gates_Tj[..., None]
    return Choice(moved.ids.reshape(tokens, -1), gates_TjK.reshape(tokens, -1), total)


def scores_of_chosen(
    x_TD: Float[Array, "T D"],
    chosen_Tj: Int[Array, "T j"],
    routers: Routers,
    implementation: str | None = None,
) -> tuple[Float[Array, "H slots N1"], Float[Array, "H slots N2"], Slots]:
    """Returns the scores of both sides for pairs of a token and a metaexpert, and their slots."""
    metaexperts, heads = routers.keys1.shape[:2]
    block = block_size(chosen_Tj.size, metaexperts)
    slots = sorted_slots(chosen_Tj, metaexperts, block)
    multiply = partial(expert_dot, implementation)
    blocks_SbD = to_slots(x_TD, slots).reshape(-1, block, x_TD.shape[-1])
    query_SbF = multiply(blocks_SbD, routers.query, slots.expert)
    query_SbHd = query_SbF.reshape(*query_SbF.shape[:2], heads, -1)
    if routers.norm is not None:
        scale, bias = (each[slots.expert][:, None, None] for each in routers.norm)
        query_SbHd = jax.nn.standardize(query_SbHd, epsilon=EPSILON) * scale + bias

    # Every head of a metaexpert counts as one of H M experts, head by head, so they ascend.
    of_heads = metaexperts * jnp.arange(heads, dtype=slots.expert.dtype)[:, None] + slots.expert

    def side(query_SbHd: Array, keys_MHNd: Array) -> Array:
        queries = jnp.moveaxis(query_SbHd, 2, 0).reshape(-1, block, query_SbHd.shape[-1])
        keys = keys_MHNd.transpose(1, 0, 3, 2).reshape(heads * metaexperts, queries.shape[-1], -1)
        return multiply(queries, keys, of_heads.reshape(-1)).reshape(heads, -1, keys.shape[-1])

    first, second = jnp.split(query_SbHd, 2, axis=-1)
    return side(first, routers.keys1), side(second, routers.keys2), slots


def _ids_of_pairs(ids: Array, slots: Slots) -> Array:
    return ids[slots.of_pair]  # `from_slots` would define a gradient
