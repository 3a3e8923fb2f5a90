"""Statistics of the codes of packed pools: distribution, saturated vectors and scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.codes import CODES
from pallas_kernels.storage import ExpertPool, read_codes
from peerjax.evaluation.probe import Probe
from peerjax.model import Decoder
from peerjax.stacks import BLOCK

EXPERTS_PER_CHUNK = 1024
# A vector is saturated if more than this share of its codes is at the limit. Normal weights have
# 1%, with a scale that follows their RMS.
SATURATED_ABOVE = 0.05


class CodeStatistics(NamedTuple):
    """Statistics of the codes of each layer of a stack.

    Attributes:
        histogram: share of the codes in each eighth of the range of magnitudes. For int4 codes, the
            eighths are the magnitudes 0, 1, ..., 7. With fewer levels, some eighths are empty.
        saturated_rows: share of vectors (`down` or `up`) with more than `SATURATED_ABOVE` of their
            codes at the limit.
        log_scale: mean of the natural logarithm of the scales.
    """

    histogram: Float[Array, "layers 8"]
    saturated_rows: Float[Array, " layers"]
    log_scale: Float[Array, " layers"]


@dataclasses.dataclass(frozen=True)
class Codes(Probe):
    """The probe of the codes of packed pools, by layer; see `CodeStatistics`."""

    of_model: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, tuple[str, str]]] = {
        "saturated_rows": ("saturated rows", ".2%"),
        "log_scale": ("log scale", ".3f"),
    }

    def result(self, model: Decoder, sums: Any, variables: dict[str, Any]) -> dict[str, Any]:
        """Returns the statistics by layer, and nothing for float pools."""
        found = {}
        for stack, of_stack in variables["pools"].items():
            for name, pool in of_stack.items():
                if not pool.is_packed:
                    continue
                statistics = jax.device_get(_code_statistics(pool))
                suffix = model.config.pool_name(stack, name)
                layers = model.config.place((stack, BLOCK)).layers
                for layer, histogram, saturated, log_scale in zip(layers, *statistics, strict=True):
                    found[f"layer_{layer}{suffix}"] = {
                        "saturated_rows": float(saturated),
                        "log_scale": float(log_scale),
                        **{f"share_{part}": float(share) for part, share in enumerate(histogram)},
                    }
        return found

    def figures(self, name: str, text: str, result: Mapping[str, Any]) -> dict[str, float]:
        """Returns all statistics, as `codes/<layer>/...`."""
        return {
            f"codes/{layer}/{figure}": value
            for layer, found in result.items()
            for figure, value in found.items()
        }


def code_statistics(pool: ExpertPool) -> CodeStatistics:
    """Computes the statistics of a whole stack of packed pools, one chunk of experts at a time."""
    top = CODES[pool.storage].top
    layers, num_experts, chunk = pool.weights.shape[0], pool.num_experts, EXPERTS_PER_CHUNK
    chunks = -(-num_experts // chunk)
    rows = float(num_experts * 2)  # an integer number of codes may not fit in 32 bits

    def add_chunk(index: Array, totals: CodeStatistics) -> CodeStatistics:
        layer, first = index // chunks, index % chunks * chunk
        ids = first + jnp.arange(chunk)
        valid = (ids < num_experts)[:, None, None]
        safe = jnp.minimum(ids, num_experts - 1)
        codes = jnp.abs(read_codes(pool.weights, layer, safe, pool.width, pool.storage))
        eighth = codes * 8 // (top + 1)
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


_code_statistics = jax.jit(code_statistics)
