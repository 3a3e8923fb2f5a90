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


class Retrieved(NamedTuple):
    """The experts with the largest scores for every token and head, best first.

    Attributes:
        ids_HTk: numbers of the experts.
        scores_HTk: their scores, without a gradient.
        scores_of: function from numbers of experts to their scores, with a gradient.
        num_experts: N, number of experts to choose from.
    """

    ids_HTk: Int[Array, "H T k"]
    scores_HTk: Float[Array, "H T k"]
    scores_of: Callable[[Array], Array]
    num_experts: int

    def choose(self, gate: Gate = SOFTMAX) -> tuple[Choice, Float[Array, "H T k"]]:
        """Applies a gate.

        Returns:
            A choice of K = H k experts for each token, head by head, and the scores that the gate
            weighed. No gradient flows through the ids. Rematerialisation saves the ids after
            experts that are not kept are left out.
        """
        ids_HTk, none = self.ids_HTk, self.num_experts
        if gate.is_kept is not None:
            ids_HTk = jnp.where(gate.is_kept(self.scores_HTk), ids_HTk, none)
        ids_HTk = checkpoint_name(ids_HTk, EXPERT_IDS)
        scores_HTk = self.scores_of(jnp.minimum(ids_HTk, none - 1))
        if gate.is_kept is not None:
            lowest = jnp.finfo(scores_HTk.dtype).min
            scores_HTk = jnp.where(ids_HTk == none, lowest, scores_HTk)
        gates_HTk = gate.weigh(scores_HTk)
        if gate.is_kept is not None:
            gates_HTk = jnp.where(ids_HTk == none, 0, gates_HTk)
        ids_TK = ids_HTk.swapaxes(0, 1).reshape(ids_HTk.shape[1], -1)
        gates_TK = gates_HTk.swapaxes(0, 1).reshape(ids_TK.shape)
        return Choice(ids_TK, gates_TK, none), scores_HTk


def spread_ids(ids: Int[Array, "*S"], num_keys: tuple[int, int], spread: int) -> Int[Array, "*S"]:
    """Returns the numbers of experts in a pool whose hot sub-keys lie far apart.

    Expert (i, j) has the number `v N / V + i N2 / V + j div V` with `v = (i + j) mod V`. A range of
    N / V numbers thus has equally many experts of each sub-key, first or second. With V = 1, the
    number is `i N2 + j`.

    Args:
        ids: numbers `i N2 + j`. Larger ones do not change.
        num_keys: (N1, N2), numbers of sub-keys.
        spread: V, a divisor of N2.
    """
    n1, n2 = num_keys
    if spread == 1:
        return ids
    i, j = ids // n2, ids % n2
    part = (i + j) % spread
    found = part * (n1 * n2 // spread) + i * (n2 // spread) + j // spread
    return jnp.where(ids < n1 * n2, found, ids)


def retrieve_by_sub_keys(
    first: SubKeys, second: SubKeys, k: int, implementation: str | None = None
) -> Retrieved:
    """Does the same as `retrieve` with the scores of both sides.

    On CPUs, the gradient goes from the chosen scores straight to queries and sub-keys.
    """
    scores1, scores2 = jax.lax.stop_gradient((first.scores(), second.scores()))
    num_keys = scores2.shape[-1]

    def scores_of(ids_HTk: Int[Array, "H T k"]) -> Float[Array, "H T k"]:
        of_first = sharded_scores_at(*first, scores1, ids_HTk // num_keys, implementation)
        return of_first + sharded_scores_at(*second, scores2, ids_HTk % num_keys, implementation)

    return _retrieve(scores1, scores2, k, scores_of, implementation)


def retrieve(
    scores1_HTN: Float[Array, "H T N1"],
    scores2_HTM: Float[Array, "H T N2"],
    k: int,
    implementation: str | None = None,
) -> Retrieved:
    """Retrieves the k experts with the largest scores for every token and head.

    Args:
        scores1_HTN: scores of the first sub-keys, by head.
        scores2_HTM: scores of the second sub-keys, by head.
        k: number of experts that each head retrieves.
        implementation: implementation of `pallas_kernels.product_keys`; `None` chooses by the
            platform.

    Raises:
        ValueError: if there are fewer than k experts.
    """
    fixed = jax.lax.stop_gradient((scores1_HTN, scores2_HTM))
    scores_of = partial(pair_scores, scores1_HTN, scores2_HTM)
    return _retrieve(*fixed, k, scores_of, implementation)


def product_key_choice(
    scores1_HTN: Float[Array, "H T N1"],
    scores2_HTM: Float[Array, "H T N2"],
    k: int,
    gate: Gate = SOFTMAX,
    implementation: str | None = None,
) -> Choice:
    """Retrieves experts as `retrieve` does, and applies a gate to their scores."""
    return retrieve(scores1_HTN, scores2_HTM, k, implementation).choose(gate)[0]


def _retrieve(
    scores1_HTN: Array,
    scores2_HTM: Array,
    k: int,
    scores_of: Callable[[Array], Array],
    implementation: str | None,
) -> Retrieved:
    ids_HTk = sharded_top_k_pairs(scores1_HTN, scores2_HTM, k, implementation)
    scores_HTk = pair_scores(scores1_HTN, scores2_HTM, ids_HTk)
    num_experts = scores1_HTN.shape[-1] * scores2_HTM.shape[-1]
    return Retrieved(ids_HTk, scores_HTk, scores_of, num_experts)
