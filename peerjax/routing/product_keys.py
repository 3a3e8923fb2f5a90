"""Product-key retrieval: the exact top-k of N1 * N2 scores at the cost of N1 + N2.

Expert (i, j) has number i * N2 + j and score s1_i + s2_j.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from peerjax.routing.auxiliary import EXPERT_IDS
from peerjax.routing.choice import Choice
from peerjax.routing.gates import SOFTMAX, Gate


def product_key_choice(
    scores1_HTN: Float[Array, "H T N1"],
    scores2_HTM: Float[Array, "H T N2"],
    k: int,
    gate: Gate = SOFTMAX,
) -> Choice:
    """Chooses the k experts with the largest scores for every token and head.

    Args:
        scores1_HTN: scores of the first sub-keys, by head.
        scores2_HTM: scores of the second sub-keys, by head.
        k: number of experts that each head chooses.
        gate: rule that turns scores into gates.

    Returns:
        A choice of K = H k experts out of N1 * N2 for each token, head by head. No gradient flows
        through the ids. Rematerialisation saves the ids after experts that are off are left out.

    Raises:
        ValueError: if there are fewer than k experts.
    """
    num_experts = scores1_HTN.shape[-1] * scores2_HTM.shape[-1]
    fixed = jax.lax.stop_gradient((scores1_HTN, scores2_HTM))
    ids_HTk = top_k_pairs(*fixed, k)
    if gate.is_on is not None:
        is_on_HTk = gate.is_on(pair_scores(*fixed, ids_HTk))
        ids_HTk = jnp.where(is_on_HTk, ids_HTk, num_experts)
    ids_HTk = checkpoint_name(ids_HTk, EXPERT_IDS)
    # "No expert" has no score. Any will do, because its gate becomes 0.
    scored_HTk = jnp.minimum(ids_HTk, num_experts - 1)
    gates_HTk = gate.weigh(pair_scores(scores1_HTN, scores2_HTM, scored_HTk))
    if gate.is_on is not None:
        gates_HTk = jnp.where(ids_HTk == num_experts, 0, gates_HTk)
    ids_TK = ids_HTk.swapaxes(0, 1).reshape(ids_HTk.shape[1], -1)
    gates_TK = gates_HTk.swapaxes(0, 1).reshape(ids_TK.shape)
    return Choice(ids_TK, gates_TK, num_experts)


def top_k_pairs(
    scores1: Float[Array, "*S N1"], scores2: Float[Array, "*S N2"], k: int
) -> Int[Array, "*S k"]:
    """Finds the k largest of all sums `scores1_i + scores2_j`.

    The result is exact. A pair among the k largest has its i among the k largest of `scores1` and
    its j among the k largest of `scores2`. So the top k of the k * k sums are the top k of all.

    Args:
        scores1: scores of the first sub-keys.
        scores2: scores of the second sub-keys.
        k: number of pairs to find.

    Returns:
        Expert numbers i * N2 + j, best first.

    Raises:
        ValueError: if there are fewer than k pairs.

    References:
        Lample et al., "Large Memory Layers with Product Keys", arXiv:1907.05242, section 3.1.
    """
    n1, n2 = scores1.shape[-1], scores2.shape[-1]
    if n1 * n2 < k:
        raise ValueError(f"cannot choose {k} experts of {n1} * {n2}; lower k or add sub-keys")
    # On CPU, `top_k` is many times slower with more than two dimensions.
    best1, index1 = jax.lax.top_k(scores1.reshape(-1, n1), min(k, n1))
    best2, index2 = jax.lax.top_k(scores2.reshape(-1, n2), min(k, n2))
    sums = best1[:, :, None] + best2[:, None, :]
    experts = index1[:, :, None] * n2 + index2[:, None, :]
    _, chosen = jax.lax.top_k(sums.reshape(sums.shape[0], -1), k)
    ids = jnp.take_along_axis(experts.reshape(experts.shape[0], -1), chosen, axis=1)
    return ids.reshape(*scores1.shape[:-1], k)


def pair_scores(
    scores1: Float[Array, "*S N1"], scores2: Float[Array, "*S N2"], ids: Int[Array, "*S k"]
) -> Float[Array, "*S k"]:
    """Reads the scores `scores1_i + scores2_j` of experts `ids`. The result is differentiable.

    A backward pass that computes the scores again can resolve a near-tie the other way. Scores that
    are read at given ids, and not taken from a top-k, still belong to these ids.
    """
    n2 = scores2.shape[-1]
    first = jnp.take_along_axis(scores1, ids // n2, axis=-1)
    second = jnp.take_along_axis(scores2, ids % n2, axis=-1)
    return first + second
