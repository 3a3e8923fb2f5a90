"""The probe of large activations of the residual stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peerjax.evaluation.probe import ALL, Probe
from peerjax.model import Decoder
from peerjax.routing.auxiliary import SINKS


class ActivationSums(NamedTuple):
    """Figures of the residual stream after each block.

    Attributes:
        largest: largest magnitude so far.
        median: sum over rows of the median magnitude.
        rows: number of rows.
    """

    largest: Float[Array, " layers"]
    median: Float[Array, " layers"]
    rows: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class LargeActivations(Probe):
    """`largest`, `median` and `ratio`: magnitudes of the residual stream after each block.

    `largest` is over all text, and `median` is the mean over rows of each row's median. `ratio` is
    the first divided by the second.

    References:
        Sun et al., "Massive Activations in Large Language Models", arXiv:2402.17762, section 2.
    """

    keeps: ClassVar[tuple[str, ...]] = (SINKS,)
    columns: ClassVar[Mapping[str, tuple[str, str]]] = {
        "largest": ("largest", ".1f"),
        "median": ("median", ".3f"),
        "ratio": ("largest / median", ".1f"),
    }

    def zeros(self, model: Decoder) -> ActivationSums:
        """Returns sums of zero."""
        zeros = jnp.zeros(model.config.depth)
        return ActivationSums(zeros, zeros, jnp.zeros(()))

    def add(
        self,
        model: Decoder,
        sums: ActivationSums,
        logits_BLV: Array,
        kept: Any,
        batch: dict[str, Array],
    ) -> ActivationSums:
        """Adds a batch to the sums."""
        weight_B = batch["weight"]
        largest_NB, median_NB = (
            model.config.in_order(kept[SINKS], name) for name in ("largest", "median")
        )
        return ActivationSums(
            largest=jnp.maximum(sums.largest, jnp.max(largest_NB * weight_B, axis=1)),
            median=sums.median + median_NB @ weight_B,
            rows=sums.rows + jnp.sum(weight_B),
        )

    def result(self, model: Decoder, sums: ActivationSums, variables: Any) -> dict[str, Any]:
        """Returns the figures by layer."""
        sums = jax.device_get(sums)
        found = {}
        for layer, (largest, median) in enumerate(
            zip(sums.largest, sums.median / sums.rows, strict=True)
        ):
            found[f"layer_{layer}"] = {
                "largest": float(largest),
                "median": float(median),
                "ratio": float(largest / median),
            }
        return found

    def figures(self, name: str, text: str, result: Mapping[str, Any]) -> Mapping[str, float]:
        """Returns the figures on all text, as `activations/all/<layer>/...`."""
        return super().figures(name, text, result) if text == ALL else {}
