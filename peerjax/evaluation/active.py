"""The probe of active experts, for gates with which their number differs between tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peerjax.evaluation.probe import Probe, columns_by_layer
from peerjax.evaluation.usage import Router, routers, spec_of
from peerjax.model import Decoder
from peerjax.routing.auxiliary import CHOICE, ROUTING, by_module


class ActiveCounts(NamedTuple):
    """Counts over text.

    Attributes:
        tokens: number of tokens with 0, 1, ..., K active experts.
        cut_off: number of pairs (token, head) in which all retrieved experts are active. Further
            experts might have passed the gate.
    """

    tokens: Int[Array, "layers K+1"]
    cut_off: Int[Array, " layers"]


@dataclasses.dataclass(frozen=True)
class ActiveExperts(Probe):
    """The number of active experts a token, by layer, for layers in which it differs.

    - `mean` and `deviation` of the number
    - `none` and `all`, the shares of tokens with no active expert and with all retrieved ones
    - `cut_off`, the share of pairs (token, head) in which all retrieved experts are active
    - `distribution`, the share of tokens with 0, 1, ..., K active experts
    """

    keeps: ClassVar[tuple[str, ...]] = (ROUTING,)
    by_text: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, tuple[str, str]]] = {
        "mean": ("mean", ".2f"),
        "deviation": ("deviation", ".2f"),
        "none": ("none", ".1%"),
        "all": ("all", ".1%"),
        "cut_off": ("cut off", ".1%"),
    }

    def zeros(self, model: Decoder) -> dict[str, ActiveCounts]:
        """Returns counts of zero, by the path of the module."""
        zeros = {}
        for router, heads, k in _adaptive(model):
            layers = len(router.names)
            zeros["/".join(router.path)] = ActiveCounts(
                jnp.zeros((layers, heads * k + 1), jnp.int32), jnp.zeros(layers, jnp.int32)
            )
        return zeros

    def add(
        self, model: Decoder, sums: Any, logits_BLV: Array, kept: Any, batch: dict[str, Array]
    ) -> Any:
        """Adds a batch to the counts."""
        weight_BL = jnp.broadcast_to(batch["weight"][:, None], logits_BLV.shape[:2])
        weight_T = weight_BL.reshape(-1).astype(jnp.int32)
        choices, added = by_module(kept[ROUTING]), {}
        for router, heads, k in _adaptive(model):
            choice, path = choices[router.path][CHOICE], "/".join(router.path)
            is_active = choice.ids < choice.num_experts
            of_head = jnp.sum(is_active.reshape(*is_active.shape[:2], heads, k), axis=-1)
            layer = jnp.arange(len(router.names))[:, None]
            added[path] = ActiveCounts(
                sums[path].tokens.at[layer, jnp.sum(of_head, axis=-1)].add(weight_T),
                sums[path].cut_off
                + jnp.sum((of_head == k) * weight_T[:, None], axis=(1, 2), dtype=jnp.int32),
            )
        return added

    def result(self, model: Decoder, sums: Any, variables: Any) -> dict[str, Any]:
        """Returns the figures by layer."""
        found = {}
        for router, heads, _ in _adaptive(model):
            counts = jax.device_get(sums["/".join(router.path)])
            for name, tokens, cut_off in zip(router.names, *counts, strict=True):
                pairs = int(tokens.sum()) * heads
                found[name] = {**_figures(tokens / tokens.sum()), "cut_off": int(cut_off) / pairs}
        return found

    def figures(self, name: str, text: str, result: Mapping[str, Any]) -> dict[str, float]:
        """Returns the figures on all text, as `active/<layer>/...`."""
        return columns_by_layer(self, name, text, result)


def _figures(distribution: Float[np.ndarray, " K+1"]) -> dict[str, Any]:
    numbers = np.arange(len(distribution))
    mean = float(numbers @ distribution)
    return {
        "mean": mean,
        "deviation": float(np.sqrt((numbers - mean) ** 2 @ distribution)),
        "none": float(distribution[0]),
        "all": float(distribution[-1]),
        "distribution": distribution,
    }


def _adaptive(model: Decoder) -> Iterator[tuple[Router, int, int]]:
    """Yields each router with an adaptive gate, its heads and its experts a head."""
    for router in routers(model):
        spec = spec_of(model, router)
        if spec.is_adaptive:
            yield router, spec.heads, spec.experts_per_head
