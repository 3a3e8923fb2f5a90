"""Product keys by native kernels on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.native_cpu.library import call


def top_k_pairs(
    scores1: Float[Array, "R N1"], scores2: Float[Array, "R N2"], k: int
) -> Int[Array, "R k"]:
    """Computes what `pallas_kernels.product_keys.xla.top_k_pairs` computes."""
    ids = jax.ShapeDtypeStruct((scores1.shape[0], k), jnp.int32)
    return call("peer_top_pairs", ids, *(each.astype(jnp.float32) for each in (scores1, scores2)))


def score_gradient(
    query_THd: Float[Array, "T H d"],
    keys_HNd: Float[Array, "H N d"],
    index_HTk: Int[Array, "H T k"],
    d_HTk: Float[Array, "H T k"],
) -> tuple[Float[Array, "T H d"], Float[Array, "H N d"]]:
    """Computes what `pallas_kernels.product_keys.xla.score_gradient` computes."""
    results = tuple(jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in (query_THd, keys_HNd))
    index = index_HTk.astype(jnp.int32)
    return call("peer_score_gradient", results, query_THd, keys_HNd, index, d_HTk)
