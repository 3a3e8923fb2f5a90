"""Product keys in plain XLA. It always works, and is the reference for every kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.platforms import by_platform


def top_k_pairs(
    scores1: Float[Array, "R N1"], scores2: Float[Array, "R N2"], k: int
) -> Int[Array, "R k"]:
    """Takes the top k of both rows, and the top k of their k * k sums."""
    n1, n2 = scores1.shape[-1], scores2.shape[-1]
    best1, index1 = jax.lax.top_k(scores1, min(k, n1))
    best2, index2 = jax.lax.top_k(scores2, min(k, n2))
    sums = best1[:, :, None] + best2[:, None, :]
    experts = index1[:, :, None] * n2 + index2[:, None, :]
    _, chosen = jax.lax.top_k(sums.reshape(sums.shape[0], -1), k)
    return jnp.take_along_axis(experts.reshape(experts.shape[0], -1), chosen, axis=1)


def score_gradient(
    query_THd: Float[Array, "T H d"],
    keys_HNd: Float[Array, "H N d"],
    index_HTk: Int[Array, "H T k"],
    d_HTk: Float[Array, "H T k"],
) -> tuple[Float[Array, "T H d"], Float[Array, "H N d"]]:
    """Returns the gradients of queries and sub-keys from those of chosen scores."""
    operands = (query_THd, keys_HNd, index_HTk, d_HTk)
    return by_platform(*operands, cpu=_by_pair, default=_by_product)


def _by_pair(
    query_THd: Array, keys_HNd: Array, index_HTk: Array, d_HTk: Array
) -> tuple[Array, Array]:
    """Adds up (token, sub-key) pairs, head by head."""

    def of_head(_: None, each: tuple[Array, Array, Array, Array]) -> tuple[None, Any]:
        query_Td, keys_Nd, index_Tk, d_Tk = each
        d_query_Td = jnp.einsum("tk,tkd->td", d_Tk, keys_Nd[index_Tk])
        d_pairs_Tkd = d_Tk[..., None] * query_Td[:, None]
        return None, (d_query_Td, jnp.zeros_like(keys_Nd).at[index_Tk].add(d_pairs_Tkd))

    heads = (query_THd.swapaxes(0, 1), keys_HNd, index_HTk, d_HTk)
    _, (d_query_HTd, d_keys_HNd) = jax.lax.scan(of_head, None, heads)
    return d_query_HTd.swapaxes(0, 1), d_keys_HNd


def _by_product(
    query_THd: Array, keys_HNd: Array, index_HTk: Array, d_HTk: Array
) -> tuple[Array, Array]:
    """Puts the gradients among those of all scores, and multiplies matrices."""
    heads, tokens = (jnp.arange(size) for size in index_HTk.shape[:2])
    place = (heads[:, None, None], tokens[:, None], index_HTk)
    zeros_HTN = jnp.zeros((*index_HTk.shape[:2], keys_HNd.shape[1]), d_HTk.dtype)
    d_HTN = zeros_HTN.at[place].add(d_HTk)
    return (
        jnp.einsum("htn,hnd->thd", d_HTN, keys_HNd),
        jnp.einsum("htn,thd->hnd", d_HTN, query_THd),
    )
