"""What the codes of packed pools look like: how they are spread, how many rows are full, scales."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.expert_update.integer_step import largest_code
from pallas_kernels.storage import BITS, ExpertPool, read_codes

EXPERTS_PER_CHUNK = 1024
# Share of a row's codes at their limit. Normal weights, whose scale follows their RMS, have 1%.
SATURATED_ABOVE = 0.05


class CodeStatistics(NamedTuple):
    """Of each layer of a stack.

    Attributes:
        histogram: share of the codes in each eighth of the range of magnitudes; of int4 codes,
            these are the magnitudes 0, 1, ..., 7 themselves.
        saturated_rows: share of rows (`down` or `up`) of which more than `SATURATED_ABOVE` of the
            codes are at their limit.
        log_scale: mean of the natural logarithm of the scales.
    """

    histogram: Float[Array, "layers 8"]
    saturated_rows: Float[Array, " layers"]
    log_scale: Float[Array, " layers"]


def code_statistics(pool: ExpertPool) -> CodeStatistics:
    """Reads a whole stack of packed pools, a chunk of experts at a time."""
    top = largest_code(BITS[pool.storage])
    layers, num_experts, chunk = pool.weights.shape[0], pool.num_experts, EXPERTS_PER_CHUNK
    chunks = -(-num_experts // chunk)
    rows = float(num_experts * 2)  # as an integer, the number of codes may not fit 32 bits

    def add_chunk(index: Array, totals: CodeStatistics) -> CodeStatistics:
        layer, first = index // chunks, index % chunks * chunk
        ids = first + jnp.arange(chunk)
        valid = (ids < num_experts)[:, None, None]
        safe = jnp.minimum(ids, num_experts - 1)
        codes = jnp.abs(read_codes(pool.weights, layer, safe, pool.width, pool.storage))
        eighth = codes >> (BITS[pool.storage] - 4)
        counts = jnp.stack([jnp.sum((eighth == each) & valid) for each in range(8)])
        full = jnp.mean(codes >= top, axis=-1) > SATURATED_ABOVE
        return totals._replace(
            histogram=totals.histogram.at[layer].add(counts / (rows * pool.width)),
            saturated_rows=totals.saturated_rows.at[layer].add(
                jnp.sum(full & valid[..., 0]) / rows
            ),
        )

    log_scale = jnp.mean(jnp.log(pool.scales), axis=(1, 2))
    zeros = CodeStatistics(jnp.zeros((layers, 8)), jnp.zeros(layers), log_scale)
    return jax.lax.fori_loop(0, layers * chunks, add_chunk, zeros)
