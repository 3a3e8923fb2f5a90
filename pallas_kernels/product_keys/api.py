"""The public operations on product keys."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Kernel, check_implementation, dispatch
from pallas_kernels.product_keys import native_cpu, xla


def top_k_pairs(
    scores1: Float[Array, "*S N1"],
    scores2: Float[Array, "*S N2"],
    k: int,
    implementation: str | None = None,
) -> Int[Array, "*S k"]:
    """Finds the k largest of all sums `scores1_i + scores2_j`.

    The result is exact. A pair among the k largest has its i among the k largest of `scores1` and
    its j among the k largest of `scores2`. So the top k of the k * k sums are the top k of all. NaN
    counts as the largest score. No gradient flows through the result.

    Args:
        scores1: scores of the first sub-keys, float32.
        scores2: scores of the second sub-keys, float32.
        k: number of pairs to find.
        implementation: one of `pallas_kernels.dispatch.IMPLEMENTATIONS`. Only "native_cpu" has
            kernels for this. `None` selects them on CPUs, if they are there.

    Returns:
        Expert numbers i * N2 + j, best first. Of equal sums, the one with the better i comes first.

    Raises:
        ValueError: if there are fewer than k pairs, or the implementation is unknown or cannot be
            used.

    References:
        Lample et al., "Large Memory Layers with Product Keys", arXiv:1907.05242, section 3.1.
    """
    n1, n2 = scores1.shape[-1], scores2.shape[-1]
    if n1 * n2 < k:
        raise ValueError(f"cannot choose {k} experts of {n1} * {n2}; lower k or add sub-keys")
    # On CPU, `top_k` of XLA is many times slower with more than two dimensions.
    rows = scores1.reshape(-1, n1), scores2.reshape(-1, n2)
    ids = _dispatch("retrieve experts", "top_k_pairs", implementation, rows, k=k)
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


def scores_at(
    query_THd: Float[Array, "T H d"],
    keys_HNd: Float[Array, "H N d"],
    scores_HTN: Float[Array, "H T N"],
    index_HTk: Int[Array, "H T k"],
    implementation: str | None = None,
) -> Float[Array, "H T k"]:
    """Reads the scores of some sub-keys, with a gradient for their queries and keys alone.

    On CPUs, the gradient of the chosen scores goes straight to queries and keys. No array of the
    size of all scores is filled or multiplied. Elsewhere it is, because matrix units are faster
    than scattered additions.

    Args:
        query_THd: queries by token and head, float32.
        keys_HNd: sub-keys of every head, float32.
        scores_HTN: products of all queries and sub-keys. They get no gradient.
        index_HTk: numbers of the sub-keys, in [0, N).
        implementation: one of `pallas_kernels.dispatch.IMPLEMENTATIONS`. Only "native_cpu" has
            kernels for this. `None` selects them on CPUs, if they are there.

    Raises:
        ValueError: if the implementation is unknown or cannot be used.
    """
    check_implementation(implementation)
    return _scores_at(implementation, query_THd, keys_HNd, scores_HTN, index_HTk)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores_at(implementation, query_THd, keys_HNd, scores_HTN, index_HTk):
    return jnp.take_along_axis(scores_HTN, index_HTk, axis=-1)


def _scores_at_fwd(implementation, query_THd, keys_HNd, scores_HTN, index_HTk):
    chosen = _scores_at(implementation, query_THd, keys_HNd, scores_HTN, index_HTk)
    return chosen, (query_THd, keys_HNd, index_HTk)


def _scores_at_bwd(implementation, kept, d_HTk):
    operands = (*kept, d_HTk)
    gradients = _dispatch("differentiate scores", "score_gradient", implementation, operands)
    return *gradients, None, None


_scores_at.defvjp(_scores_at_fwd, _scores_at_bwd)


def _dispatch(operation, function, implementation, operands, **settings):
    xla_function, native = (
        partial(getattr(each, function), **settings) for each in (xla, native_cpu)
    )
    kernels = {"native_cpu": Kernel(native)}
    return dispatch(operation, implementation, xla_function, kernels, *operands)
