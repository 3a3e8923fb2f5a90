"""Probes of the usage of experts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peerjax.evaluation.probe import Probe, columns_by_layer
from peerjax.model import Decoder, kept_of
from peerjax.routing.auxiliary import CHOICE, ROUTING, by_module

# Number of ranks, evenly spread on a logarithmic scale, at which `Usage` reads shares of experts.
CURVE_POINTS = 256


class Router(NamedTuple):
    """A module that sows its choices.

    Attributes:
        path: path of the module.
        names: names of the layers that have it, with the module's name if a layer has several.
        num_experts: N, number of experts to choose from.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    num_experts: int


@functools.cache
def routers(model: Decoder, name: str = CHOICE) -> tuple[Router, ...]:
    """Returns the modules of a model that sow a router's choices, in the order of their layers.

    Args:
        model: the decoder.
        name: name under which they are sown: "choice" for those of experts, "metaexperts" for those
            of metarouters.
    """
    found = {
        path: sown[name]
        for path, sown in by_module(kept_of(model, ROUTING, 1)).items()
        if name in sown and getattr(sown[name], "is_routed", True)
    }
    places = {path: model.config.place(path) for path in found}
    owners = [layer for place in places.values() for layer in place.layers]
    result = []
    for path, place in sorted(places.items(), key=lambda each: tuple(each[1].layers)):
        names = tuple(
            f"layer_{layer}" if owners.count(layer) == 1 else f"layer_{layer}.{path[-1]}"
            for layer in place.layers
        )
        result.append(Router(path, names, found[path].num_experts))
    return tuple(result)


def spec_of(model: Decoder, router: Router) -> Any:
    """Returns the kind of feed-forward layer that a router is in."""
    return model.config.layers[model.config.place(router.path).stack][0]


@dataclasses.dataclass(frozen=True)
class GateSums(Probe):
    """The sum of every expert's gates over the text, by layer: float32 [N].

    Attributes:
        name: "metaexperts" for sums of metaexperts, as in `routers`.
    """

    keeps: ClassVar[tuple[str, ...]] = (ROUTING,)
    name: str = CHOICE

    def zeros(self, model: Decoder) -> dict[str, Float[Array, "layers N"]]:
        """Returns sums of zero, by the path of the module."""
        return {
            "/".join(each.path): jnp.zeros((len(each.names), each.num_experts), jnp.float32)
            for each in routers(model, self.name)
        }

    def add(
        self, model: Decoder, sums: Any, logits_BLV: Array, kept: Any, batch: dict[str, Array]
    ) -> Any:
        """Adds a batch to the sums."""
        weight_BL = jnp.broadcast_to(batch["weight"][:, None], logits_BLV.shape[:2])
        choices = by_module(kept[ROUTING])
        return {
            path: total
            + choices[tuple(path.split("/"))][self.name].gate_sums(weight_BL.reshape(-1))
            for path, total in sums.items()
        }

    def result(self, model: Decoder, sums: Any, variables: Any) -> dict[str, Any]:
        """Returns the sums on the host, by layer."""
        return _by_layer(model, jax.device_get(sums), self.name)

    def figures(self, name: str, text: str, result: Mapping[str, Any]) -> dict[str, float]:
        """Returns no metrics, because each layer would have N of them."""
        return {}


@dataclasses.dataclass(frozen=True)
class Usage(GateSums):
    """`usage` and `unevenness` of every layer's experts, and the `curve` of their shares.

    `expert_usage` defines the first two. The curve has the shares of the gates of the experts at
    some ranks, times N, with the most used expert first. `curve_ranks` returns the ranks.
    """

    columns: ClassVar[Mapping[str, tuple[str, str]]] = {
        "usage": ("usage", ".1%"),
        "unevenness": ("unevenness", ".3f"),
    }

    def result(self, model: Decoder, sums: Any, variables: Any) -> dict[str, Any]:
        """Returns the results by layer. Only they are copied to the host."""
        reduced = jax.device_get(_usage_of_layers(sums))
        by_layer = {
            name: _by_layer(model, {path: each[name] for path, each in reduced.items()}, self.name)
            for name in ("usage", "unevenness", "curve")
        }
        return {
            layer: {
                "usage": float(by_layer["usage"][layer]),
                "unevenness": float(by_layer["unevenness"][layer]),
                "curve": by_layer["curve"][layer],
                "num_experts": num_experts,
            }
            for layer, num_experts in _sizes(model, self.name).items()
        }

    def figures(self, name: str, text: str, result: Mapping[str, Any]) -> dict[str, float]:
        """Returns usage and unevenness on all text, as `experts/<layer>/...`."""
        return columns_by_layer(self, name, text, result)


def expert_usage(
    gate_sums: Float[Array, " N"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns usage and unevenness of a layer.

    Let z_i be the sum of expert i's gates over the text, normalised to sum 1. Then
    `usage = #{z_i > 0} / N`, and `unevenness = log N + sum_i z_i log z_i`. Unevenness is the KL
    divergence of z from uniform, in nats. 0 means even use, and log N means that one expert gets
    everything.

    Args:
        gate_sums: z before normalisation; not all zero.

    References:
        He, "Mixture of A Million Experts", arXiv:2407.04153, section 3.3 ("Expert usage and
        query batch normalisation").
    """
    share = gate_sums / jnp.sum(gate_sums) * gate_sums.size  # 1 is even
    terms = jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0)
    return jnp.mean(share > 0), jnp.maximum(jnp.mean(terms), 0)


def curve_ranks(num_experts: int) -> np.ndarray:
    """Returns the ranks, from 1, at which the curve of N experts is read."""
    ranks = np.geomspace(1, num_experts, min(CURVE_POINTS, num_experts))
    return np.unique(np.round(ranks).astype(int))


@jax.jit
def _usage_of_layers(sums: dict[str, Array]) -> dict[str, dict[str, Array]]:
    def of_layer(gate_sums: Array) -> dict[str, Array]:
        usage, unevenness = expert_usage(gate_sums)
        descending = -jnp.sort(-gate_sums)[curve_ranks(gate_sums.size) - 1]
        curve = descending / jnp.sum(gate_sums) * gate_sums.size
        return {"usage": usage, "unevenness": unevenness, "curve": curve}

    return {path: jax.lax.map(of_layer, each) for path, each in sums.items()}


def _by_layer(model: Decoder, by_path: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the rows of arrays by the names of their layers, in the order of layers."""
    return {
        layer: row
        for router in routers(model, name)
        for layer, row in zip(router.names, by_path["/".join(router.path)], strict=True)
    }


def _sizes(model: Decoder, name: str) -> dict[str, int]:
    return {layer: router.num_experts for router in routers(model, name) for layer in router.names}
