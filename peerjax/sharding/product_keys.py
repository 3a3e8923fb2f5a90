"""Operations on product keys over a mesh: every device computes its own tokens."""

from functools import partial

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels import product_keys
from peerjax.sharding.over_mesh import over_mesh
from peerjax.sharding.rules import BATCH

BY_HEAD = P(None, *BATCH)  # arrays [heads, tokens, ...]


def sharded_top_k_pairs(
    scores1_HTN: Float[Array, "H T N1"],
    scores2_HTM: Float[Array, "H T N2"],
    k: int,
    implementation: str | None = None,
) -> Int[Array, "H T k"]:
    """Runs `pallas_kernels.product_keys.top_k_pairs` with tokens split over the mesh."""
    local = partial(product_keys.top_k_pairs, k=k, implementation=implementation)
    return over_mesh(local, (BY_HEAD, BY_HEAD), BY_HEAD)(scores1_HTN, scores2_HTM)


def sharded_scores_at(
    query_THd: Float[Array, "T H d"],
    keys_HNd: Float[Array, "H N d"],
    scores_HTN: Float[Array, "H T N"],
    index_HTk: Int[Array, "H T k"],
    implementation: str | None = None,
) -> Float[Array, "H T k"]:
    """Runs `pallas_kernels.product_keys.scores_at` with tokens split over the mesh."""
    local = partial(product_keys.scores_at, implementation=implementation)
    specs = (BATCH, P(), BY_HEAD, BY_HEAD)
    return over_mesh(local, specs, BY_HEAD)(query_THd, keys_HNd, scores_HTN, index_HTk)
