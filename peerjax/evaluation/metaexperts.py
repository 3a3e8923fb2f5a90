"""The probe of metaexperts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peerjax.evaluation.probe import Probe, columns_by_layer
from peerjax.evaluation.usage import expert_usage, routers, spec_of
from peerjax.model import Decoder
from peerjax.routing.auxiliary import METAEXPERTS, ROUTING, by_module
from peerjax.routing.metarouter import switches


class MetaSums(NamedTuple):
    """Sums over text.

    Attributes:
        gates: sum of every metaexpert's gates.
        begun: number of chunks that were not the first of their document.
        changed: number of those with other metaexperts than the token before.
    """

    gates: Float[Array, "layers M"]
    begun: Int[Array, " layers"]
    changed: Int[Array, " layers"]


@dataclasses.dataclass(frozen=True)
class Metaexperts(Probe):
    """The use of metaexperts, by layer.

    - `usage` and `unevenness`, as of experts
    - `switched`, the share of chunks with other metaexperts than the token before them. The first
      chunk of a document does not count. If tokens choose, every `chunk` tokens count as one.
    - `shares` of the metaexperts in the sum of gates
    """

    keeps: ClassVar[tuple[str, ...]] = (ROUTING,)
    by_text: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, tuple[str, str]]] = {
        "usage": ("usage", ".1%"),
        "unevenness": ("unevenness", ".3f"),
        "switched": ("switched", ".1%"),
    }

    def zeros(self, model: Decoder) -> dict[str, MetaSums]:
        """Returns sums of zero, by the path of the module."""
        zeros = {}
        for router in routers(model, METAEXPERTS):
            layers = len(router.names)
            counts = (jnp.zeros(layers, jnp.int32) for _ in range(2))
            zeros["/".join(router.path)] = MetaSums(
                jnp.zeros((layers, router.num_experts), jnp.float32), *counts
            )
        return zeros

    def add(
        self, model: Decoder, sums: Any, logits_BLV: Array, kept: Any, batch: dict[str, Array]
    ) -> Any:
        """Adds a batch to the sums."""
        rows, length = batch["positions"].shape
        weight_BL = jnp.broadcast_to(batch["weight"][:, None], (rows, length))
        choices, added = by_module(kept[ROUTING]), {}
        for router in routers(model, METAEXPERTS):
            choice, path = choices[router.path][METAEXPERTS], "/".join(router.path)
            chosen = choice.ids.reshape(len(router.names), rows, length, -1)
            chunk = spec_of(model, router).chunk
            found = [switches(of_layer, batch["positions"], chunk) for of_layer in chosen]
            begun, changed = (
                jnp.stack([jnp.sum(marks * weight_BL).astype(jnp.int32) for marks in each])
                for each in zip(*found, strict=True)
            )
            added[path] = MetaSums(
                sums[path].gates + choice.gate_sums(weight_BL.reshape(-1)),
                sums[path].begun + begun,
                sums[path].changed + changed,
            )
        return added

    def result(self, model: Decoder, sums: Any, variables: Any) -> dict[str, Any]:
        """Returns the figures by layer."""
        found = {}
        for router in routers(model, METAEXPERTS):
            of_layers = jax.device_get(sums["/".join(router.path)])
            for name, gates, begun, changed in zip(router.names, *of_layers, strict=True):
                usage, unevenness = expert_usage(jnp.asarray(gates))
                found[name] = {
                    "usage": float(usage),
                    "unevenness": float(unevenness),
                    "switched": int(changed) / max(int(begun), 1),
                    "shares": gates / gates.sum(),
                }
        return found

    def figures(self, name: str, text: str, result: Mapping[str, Any]) -> dict[str, float]:
        """Returns the figures on all text, as `metaexperts/<layer>/...`."""
        return columns_by_layer(self, name, text, result)
