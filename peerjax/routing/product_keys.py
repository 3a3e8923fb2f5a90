"""Product-key retrieval: the exact top-k of N1 * N2 scores at the cost of N1 + N2.

Expert (i, j) has number i * N2 + j and score s1_i + s2_j.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.product_keys import pair_scores
from peerjax.routing.auxiliary import EXPERT_IDS
from peerjax.routing.choice import Choice
from peerjax.routing.gates import SOFTMAX, Gate
from peerjax.sharding.product_keys import sharded_scores_at, sharded_top_k_pairs


class SubKeys(NamedTuple):
    """One side of a product-key router.

    Attributes:
        query_THd: half of the queries of every token and head.
        keys_HNd: sub-keys of every head.
    """

    query_THd: Float[Array, "T H d"]
    keys_HNd: Float[Array, "H N d"]

    def scores(self) -> Float[Array, "H T N"]:
        """Returns the products of all queries and sub-keys."""
        # Heads come first, as in the keys. The scores are the largest arrays of a step. With
        # tokens first, XLA on CPU would write them once more in another order.
        return jnp.einsum("thd,hnd->htn", self.query_THd, self.keys_HNd)


def sub_key_choice(
    first: SubKeys,
    second: SubKeys,
    k: int,
    gate: Gate = SOFTMAX,
    implementation: str | None = None,
) -> Choice:
    """Does the same as `product_key_choice` with the scores of both sides.

    On CPUs, the gradient goes from the chosen scores straight to queries and sub-keys.
    """
    scores1, scores2 = jax.lax.stop_gradient((first.scores(), second.scores()))
    num_keys = scores2.shape[-1]

    def scores_of(ids_HTk: Int[Array, "H T k"]) -> Float[Array, "H T k"]:
        of_first = sharded_scores_at(*first, scores1, ids_HTk // num_keys, implementation)
        return of_first + sharded_scores_at(*second, scores2, ids_HTk % num_keys, implementation)

    return _choose(scores1, scores2, k, gate, scores_of, implementation)


def product_key_choice(
    scores1_HTN: Float[Array, "H T N1"],
    scores2_HTM: Float[Array, "H T N2"],
    k: int,
    gate: Gate = SOFTMAX,
    implementation: str | None = None,
) -> Choice:
    """Chooses the k experts with the largest scores for every token and head.

    Args:
        scores1_HTN: scores of the first sub-keys, by head.
        scores2_HTM: scores of the second sub-keys, by head.
        k: number of experts that each head chooses.
        gate: rule that turns scores into gates.
        implementation: implementation of `pallas_kernels.product_keys`; `None` chooses by the
            platform.

    Returns:
        A choice of K = H k experts out of N1 * N2 for each token, head by head. No gradient flows
        through the ids. Rematerialisation saves the ids after experts that are off are left out.

    Raises:
        ValueError: if there are fewer than k experts.
    """
    fixed = jax.lax.stop_gradient((scores1_HTN, scores2_HTM))
    scores_of = partial(pair_scores, scores1_HTN, scores2_HTM)
    return _choose(*fixed, k, gate, scores_of, implementation)


def _choose(
    scores1_HTN: Array,
    scores2_HTM: Array,
    k: int,
    gate: Gate,
    scores_of: Callable[[Array], Array],
    implementation: str | None,
) -> Choice:
    """Chooses by scores without a gradient, and takes gates of `scores_of(ids)`, with one."""
    num_experts = scores1_HTN.shape[-1] * scores2_HTM.shape[-1]
    ids_HTk = sharded_top_k_pairs(scores1_HTN, scores2_HTM, k, implementation)
    if gate.is_on is not None:
        is_on_HTk = gate.is_on(pair_scores(scores1_HTN, scores2_HTM, ids_HTk))
        ids_HTk = jnp.where(is_on_HTk, ids_HTk, num_experts)
    ids_HTk = checkpoint_name(ids_HTk, EXPERT_IDS)
    # "No expert" has no score. Any will do, because its gate becomes 0.
    scored_HTk = jnp.minimum(ids_HTk, num_experts - 1)
    gates_HTk = gate.weigh(scores_of(scored_HTk))
    if gate.is_on is not None:
        gates_HTk = jnp.where(ids_HTk == num_experts, 0, gates_HTk)
    ids_TK = ids_HTk.swapaxes(0, 1).reshape(ids_HTk.shape[1], -1)
    gates_TK = gates_HTk.swapaxes(0, 1).reshape(ids_TK.shape)
    return Choice(ids_TK, gates_TK, num_experts)
