"""The exact map from a Monet layer to a PEER layer, with and without Monet's router.

A Monet expert (i, j) is m neurons with one gate `g1_i g2_j`. With the router of Monet, a PEER layer
of n^2 m one-neuron experts equals it: the experts `(i n + j) m + l` have `down` and `up` from the
halves i and j, and biases stay in tables of the sub-keys. Without it, a *plain* layer has m copies
of every second sub-key, its gates are a softmax over the retrieved experts, and biases are left
out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int

from pallas_kernels.storage import UP, ExpertPool
from peerjax.layers.monet import MonetConfig, MonetHDConfig, MonetVDConfig
from peerjax.layers.peer import POOL, PeerConfig
from peerjax.model import Decoder, ModelConfig
from peerjax.objectives.task import inputs_of
from peerjax.optim import dequantize
from peerjax.pool import pool_of
from peerjax.routing.auxiliary import CHOICE, ROUTING, by_module
from peerjax.routing.choice import FactoredChoice
from peerjax.routing.monet import keys_per_side
from peerjax.stacks import BLOCK, GROUP, stack_key

MONET, PEER = MonetConfig.section, PeerConfig.section
# Fields of "peer" that follow from a teacher with Monet layers.
FROM_TEACHER = (
    "num_experts",
    "heads",
    "activation",
    "query_norm",
    "gate",
    "group",
    "key_width",
    "experts_per_pair",
    "keys_on",
    "biases",
)
Pairs = Int[np.ndarray, "routers P"]
MOST = "most"  # key of the largest number of pairs, beside names of stacks


def give_fields(config: ml_collections.ConfigDict, plain: bool) -> None:
    """Changes the configuration of a teacher with Monet layers to that of a PEER of its shape.

    Fields that do not follow from the teacher keep their values: the number of experts of a head,
    and the number of pairs that have experts.

    Raises:
        ValueError: if the teacher has no Monet layer.
    """
    monet, kinds = config.monet, ("monet_hd", "monet_vd")
    if not any(kind in kinds for kind, _ in config.model.layers):
        raise ValueError(f"the teacher has no Monet layer, but model.layers={config.model.layers}")
    config.model.layers = tuple(
        ("peer" if kind in kinds else kind, count) for kind, count in config.model.layers
    )
    n, m = keys_per_side(monet.num_experts), monet.expert_width
    fields = {
        "num_experts": (n, n * m) if plain else (n, n),
        "heads": monet.heads,
        "activation": "relu2",
        "query_norm": "none",
        "gate": "softmax" if plain else "product",
        "group": monet.group,
        "key_width": min(n, config.model.width),
        "experts_per_pair": 1 if plain else m,
        "keys_on": monet.top_k,
        "biases": not plain,
    }
    for name in FROM_TEACHER:
        config.peer[name] = fields[name]
    if plain:
        config.peer.kept_pairs = 0


def neuron_weights(
    spec: MonetConfig, params: dict[str, Array], ids: Int[Array, " k"]
) -> Float[Array, "k 2 D"]:
    """Returns `down` and `up` of the one-neuron experts of a Monet layer.

    Args:
        spec: the kind of layer.
        params: its parameters, as floats.
        ids: numbers `(i n + j) m + l`. Larger ones are clipped.
    """
    n, m = keys_per_side(spec.num_experts), spec.expert_width
    ids = jnp.minimum(ids, n * n * m - 1)
    i, j, neuron = ids // (n * m), ids // m % n, ids % m
    if isinstance(spec, MonetHDConfig):
        down, up = params["u"][i * m + neuron], params["v"][:, j * m + neuron].T
        return jnp.stack([down, up], axis=1)
    half = m // 2
    own = neuron % half
    of_first, of_second = i * half + own, j * half + own
    is_first = (neuron < half)[:, None]
    down = jnp.where(is_first, params["u1"][of_first], params["u2"][of_second])
    left = jnp.where(is_first, params["v11"][:, of_first].T, params["v12"][:, of_first].T)
    right = jnp.where(is_first, params["v21"][:, of_second].T, params["v22"][:, of_second].T)
    return jnp.stack([down, jnp.concatenate([left, right], axis=1)], axis=1)


def bias_tables(spec: MonetConfig, params: dict[str, Array]) -> dict[str, Array]:
    """Returns the biases of Monet layers as the tables of a PEER layer.

    Args:
        spec: the kind of layer.
        params: parameters with a leading axis of layers.
    """
    n, m = keys_per_side(spec.num_experts), spec.expert_width
    if isinstance(spec, MonetHDConfig):
        hidden, output = params["c"].reshape(-1, n, m), params["b"]
        return {
            "hidden_bias1": hidden,
            "hidden_bias2": jnp.zeros_like(hidden),
            "output_bias1": jnp.zeros_like(output),
            "output_bias2": output,
        }
    assert isinstance(spec, MonetVDConfig)

    def side(first: Array, second: Array) -> Array:
        return jnp.concatenate([first, second], axis=-1)

    c1, c2 = (params[name].reshape(-1, n, m // 2) for name in ("c1", "c2"))
    b1, b2 = params["b1"], params["b2"]
    return {
        "hidden_bias1": side(c1, jnp.zeros_like(c1)),
        "hidden_bias2": side(jnp.zeros_like(c2), c2),
        "output_bias1": side(b1, jnp.zeros_like(b1)),
        "output_bias2": side(jnp.zeros_like(b2), b2),
    }


def plain_router(spec: MonetConfig, params: dict[str, Array], key_width: int) -> dict[str, Any]:
    """Returns queries and sub-keys of a plain PEER whose scores are those of Monet's router.

    The keys of a head are a product of `[n, d] [d, D]` by their singular values. It is exact if d
    is their rank, at most min(n, D). Otherwise it is the nearest of rank d.

    Args:
        spec: the kind of layer.
        params: parameters of the router, with a leading axis of layers.
        key_width: d.
    """
    n, heads = keys_per_side(spec.num_experts), spec.heads
    kernels, keys = [], {}
    for side, copies in ((1, 1), (2, spec.expert_width)):
        of_side = params[f"w{side}"].reshape(-1, heads, n, params[f"w{side}"].shape[-1])
        left, sizes, right = jnp.linalg.svd(of_side, full_matrices=False)
        root = jnp.sqrt(sizes[..., :key_width])
        left, right = left[..., :key_width] * root[..., None, :], right[..., :key_width, :]
        keys[f"keys{side}"] = jnp.repeat(left, copies, axis=2)
        kernels.append(right * root[..., None])
    both = jnp.concatenate(kernels, axis=2)  # [layers, H, 2 d, D]
    kernel = jnp.moveaxis(both, 3, 1).reshape(both.shape[0], both.shape[3], -1)
    return {"query": {"kernel": kernel}, **keys}


def converted(
    variables: dict[str, Any],
    teacher: ModelConfig,
    student: ModelConfig,
    kept: Mapping[str, Pairs],
) -> dict[str, Any]:
    """Returns variables with which a PEER model computes what a model with Monet layers computes.

    Args:
        variables: collections "params", "pools" and "stats" of the Monet model.
        teacher: its configuration.
        student: that of the PEER model, with the fields of `give_fields`.
        kept: the pairs of sub-keys that keep their experts, for the routers of each stack. Stacks
            whose pairs all keep them are left out.
    """
    params = dequantize(variables["params"])
    new = {name: dict(variables[name]) for name in ("pools", "stats")} | {"params": dict(params)}
    for index, ((spec, count), (peer, _)) in enumerate(
        zip(teacher.layers, student.layers, strict=True)
    ):
        if isinstance(spec, MonetConfig) and isinstance(peer, PeerConfig):
            stack = stack_key(index)
            of_stack = _Stack(spec, count, params[stack], variables["stats"][stack])
            pairs = kept.get(stack)
            new["params"][stack] = of_stack.params(peer)
            new["stats"][stack] = of_stack.stats(peer, pairs)
            new["pools"][stack] = {POOL: of_stack.pool(peer, student, pairs)}
    return new


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Equal Monet blocks.

    Attributes:
        spec: the kind of layer.
        count: number of blocks.
        of_params: their parameters.
        of_stats: their running statistics.
    """

    spec: MonetConfig
    count: int
    of_params: dict[str, Any]
    of_stats: dict[str, Any]

    @property
    def _blocks(self) -> list[tuple[str, ...]]:
        """Paths of the blocks of a period."""
        if self.spec.group == 1:
            return [(BLOCK,)]
        return [(GROUP, f"{BLOCK}_{number}") for number in range(self.spec.group)]

    def _monet(self, path: tuple[str, ...]) -> dict[str, Any]:
        return _at(self.of_params, path)[MONET]

    def params(self, peer: PeerConfig) -> dict[str, Any]:
        """Returns the parameters of PEER blocks."""
        found: dict[tuple[str, ...], Any] = {}
        for path in self._blocks:
            block = dict(_at(self.of_params, path))
            monet = block.pop(MONET)
            layer = bias_tables(self.spec, monet) if peer.biases else {}
            if path == self._blocks[0]:
                if peer.gate == "product":
                    layer["router"] = monet["router"]
                else:
                    layer |= plain_router(self.spec, monet["router"], peer.key_width)
            found[path] = {**block, **({PEER: layer} if layer else {})}
        return unflatten_dict(found)

    def stats(self, peer: PeerConfig, pairs: Pairs | None) -> dict[str, Any]:
        """Returns the running statistics of PEER blocks."""
        first = self._blocks[0]
        if peer.gate == "product":
            layer = dict(_at(self.of_stats, first)[MONET])
        else:
            keys = plain_router(self.spec, self._monet(first)["router"], peer.key_width)
            layer = {
                f"initial_norm_{name}": jnp.linalg.norm(keys[name], axis=-1)
                for name in ("keys1", "keys2")
            }
        if pairs is not None:
            layer["addresses"] = jnp.asarray(addresses(pairs, peer.num_pairs))
        return unflatten_dict({first: {PEER: layer}})

    def pool(self, peer: PeerConfig, student: ModelConfig, pairs: Pairs | None) -> ExpertPool:
        """Returns the stack of pools of PEER blocks."""
        experts = {
            name: jnp.stack([self._monet(path)[name] for path in self._blocks], axis=1)
            for name in self.spec.packable
            if name in self._monet(self._blocks[0])
        }  # [periods, blocks of a period, ...]
        m = self.spec.expert_width
        # The softmax of a plain layer divides the gate of a pair among its m experts.
        factor = 1 if peer.gate == "product" else m

        def weights_of(layer: Array, ids: Array) -> Array:
            period, block = layer // self.spec.group, layer % self.spec.group
            if pairs is not None:
                of_router = jnp.asarray(pairs)[period]
                ids = of_router[jnp.minimum(ids // m, of_router.shape[0] - 1)] * m + ids % m
            own = {name: leaf[period, block] for name, leaf in experts.items()}
            return neuron_weights(self.spec, own, ids).at[:, UP].multiply(factor)

        return pool_of(
            weights_of, self.count, peer.pools[POOL], student.width, student.pool_storage
        )


def addresses(pairs: Pairs, num_pairs: int) -> Int[np.ndarray, "routers N"]:
    """Returns the table of a layer: the place of each pair, or P for a pruned one."""
    table = np.full((len(pairs), num_pairs), pairs.shape[1], np.int32)
    np.put_along_axis(table, pairs, np.arange(pairs.shape[1], dtype=np.int32)[None], axis=1)
    return table


def pair_gates(model: Decoder) -> Callable[[Any, dict[str, Array]], dict[str, Array]]:
    """Returns a function that sums the gates of every pair of sub-keys over a batch.

    The function maps the variables of a model with Monet layers and a batch to arrays
    [routers, N] by stack, in the order of blocks. It also returns the largest number of pairs that
    a head of a token uses.
    """
    monet = [
        stack_key(index)
        for index, (spec, _) in enumerate(model.config.layers)
        if isinstance(spec, MonetConfig)
    ]

    def sums(variables: Any, batch: dict[str, Array]) -> dict[str, Array]:
        _, kept = model.apply(
            dequantize(variables), *inputs_of(batch), mutable=[ROUTING], with_head=False
        )
        found, most = {}, jnp.int32(0)
        for path, values in by_module(kept[ROUTING]).items():
            choice = values.get(CHOICE)
            if path[0] in monet and isinstance(choice, FactoredChoice):
                weight = jnp.repeat(batch["weight"], batch["inputs"].shape[1])
                found[path[0]] = choice.gate_sums(weight)
                counts = [jnp.sum(side > 0, axis=-1) for side in (choice.g1, choice.g2)]
                most = jnp.maximum(most, jnp.max(counts[0] * counts[1]))
        return {**found, MOST: most}

    return sums


def _at(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        tree = tree[name]
    return tree
