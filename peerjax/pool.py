"""Pools of experts: their initial values and the memory they take.

`pallas_kernels.storage` defines the memory layout of a pool. All other code uses `ExpertPool`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key

from pallas_kernels.codes import CODES
from pallas_kernels.expert_update import UpdateState
from pallas_kernels.expert_update.integer_step import nearest
from pallas_kernels.storage import (
    DOWN,
    FLOAT_DTYPES,
    UNIT,
    UP,
    ExpertPool,
    array_forms,
    experts_per_row,
    is_pool,
    pack_experts,
    read_floats,
    splits_into,
)
from peerjax.sharding.over_mesh import over_mesh
from peerjax.sharding.rules import EXPERT, pool_specs, shards_of_pool

EXPERTS_PER_PORTION, FEWEST_PER_PORTION = 4096, 256


def initialize_pool(
    key: Key[Array, ""],
    num_layers: int,
    num_experts: int,
    width: int,
    *,
    residual_scale: float = 1.0,
    storage: str = "float32",
    places: int | None = None,
) -> ExpertPool:
    """Draws a stack of fresh pools, a few experts at a time.

    `down ~ N(0, 1 / D)`. The hidden value of a unit-RMS input then has unit variance, as in a
    dense MLP. `up ~ N(0, residual_scale^2 / D)`.

    In a fresh layer, the experts that a head retrieves have nearly equal scores, so its gates are
    close to 1 / k. The output variance of H heads is then `var(up) * E[act^2] * H / k`. So the
    layer adds almost nothing until it has been trained.

    An `up` that is sqrt(D k / H) times as large would give a fresh layer the output of a dense MLP.
    It would train worse. An expert is hit so rarely that its `up` would keep the direction of its
    draw, and int4 codes would round to steps of the size of that draw.

    Args:
        key: random key of the draws.
        num_layers: number of pools in the stack.
        num_experts: N, experts in each pool.
        width: D, length of the vectors `down` and `up`.
        residual_scale: initial scale of `up`, as for the output projections of dense layers.
        storage: "float32", "bfloat16", or a format of `pallas_kernels.codes`. Packed pools are
            drawn in packed form. If `experts_per_row` divides N, they equal the float pool of the
            same key, rounded to nearest. Each vector has the target scale of training. Otherwise
            experts are drawn in other portions.
        places: number of experts that the arrays have room for; see `places_for`. By default, N.
            The others are drawn like experts, and no router chooses them.

    Returns:
        A stack of pools.

    Raises:
        ValueError: if the width does not fill whole words of codes, or the storage is unknown.
    """
    std = jnp.array([[0.0], [0.0]])
    std = std.at[DOWN].set(width**-0.5)
    std = std.at[UP].set(residual_scale * width**-0.5)
    portions = _Portions.of(num_experts, width, storage)
    keys = jax.random.split(key, num_layers * portions.per_pool)
    keys = keys.reshape(num_layers, portions.per_pool)
    if places is not None:
        per_pool = -(-places // portions.size)
        keys = keys[:, jnp.minimum(jnp.arange(per_pool), portions.per_pool - 1)]
        portions, num_experts = portions._replace(num_experts=places, per_pool=per_pool), places
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else shards_of_pool(num_experts, mesh)

    def draw(key: Array) -> Array:
        return std * jax.random.normal(key, (portions.size, 2, width))

    if shards == 1 or portions.per_pool % shards:
        return portions.pool(draw, keys.reshape(-1), num_layers)

    def own(keys: Array) -> ExpertPool:
        part = portions._replace(
            num_experts=num_experts // shards, per_pool=portions.per_pool // shards
        )
        pool = part.pool(draw, keys.reshape(-1), num_layers)
        return dataclasses.replace(pool, num_experts=num_experts)

    # Every device draws its own experts, so that none ever has the whole pool.
    whole = jax.eval_shape(lambda: portions.pool(draw, keys.reshape(-1), num_layers))
    return over_mesh(own, (P(None, EXPERT),), pool_specs(whole, mesh))(keys)


def places_for(num_experts: int, width: int, storage: str, parts: int) -> int:
    """Returns for how many experts the arrays of a pool need room to be split into equal parts.

    A pool is not padded by more than an eighth. It then has room for its own experts only, and is
    not split.

    Args:
        num_experts: N, experts of the pool.
        width: D.
        storage: storage of the pool.
        parts: number of parts.
    """
    if splits_into(num_experts, parts):
        return num_experts
    # Whole portions, so that every part can be drawn on its own; else whole lines.
    portion = _Portions.of(num_experts, width, storage).size
    for multiple in (math.lcm(portion, UNIT) * parts, UNIT * parts):
        places = -(-num_experts // multiple) * multiple
        if 8 * (places - num_experts) <= num_experts:
            return places
    return num_experts


def with_places(pool: ExpertPool, places: int) -> ExpertPool:
    """Returns a stack of pools with room for more experts, which are zeros."""
    if places == pool.num_experts:
        return pool
    forms = array_forms(pool.storage, places, pool.width)

    def padded(array: Array, form: jax.ShapeDtypeStruct) -> Array:
        more = [(0, 0)] + [
            (0, new - old) for new, old in zip(form.shape, array.shape[1:], strict=True)
        ]
        return jnp.pad(array, more)

    return dataclasses.replace(
        pool,
        weights=padded(pool.weights, forms["weights"]),
        scales=None if pool.scales is None else padded(pool.scales, forms["scales"]),
        num_experts=places,
    )


WeightsOf = Callable[[Array, Array], Array]


def pool_of(
    weights_of: WeightsOf,
    num_layers: int,
    num_experts: int,
    width: int,
    storage: str,
    scales_of: Callable[[Array, Array], Array] | None = None,
) -> ExpertPool:
    """Makes a stack of pools from the weights of experts, a few experts at a time.

    Codes are rounded to nearest.

    Args:
        weights_of: function from the number of a layer and numbers of experts [n] to their weights
            [n, 2, D]. It is also called with numbers beyond the last expert, whose weights are not
            used.
        num_layers: number of pools in the stack.
        num_experts: N, experts in each pool.
        width: D, length of the vectors `down` and `up`.
        storage: as in `initialize_pool`.
        scales_of: function from weights [n, 2, D] and the number of their layer to scales [n, 2].
            By default, each vector gets the scale that training aims at.
    """
    portions = _Portions.of(num_experts, width, storage)
    places = jnp.arange(num_layers * portions.per_pool)

    def read(place: Array) -> Array:
        layer, portion = place // portions.per_pool, place % portions.per_pool
        return weights_of(layer, portion * portions.size + jnp.arange(portions.size))

    def scales(weights: Array, place: Array) -> Array | None:
        return None if scales_of is None else scales_of(weights, place // portions.per_pool)

    return portions.pool(read, places, num_layers, scales)


def stored_as(
    pool: ExpertPool, storage: str, scales_of: Callable[[Array, Array], Array] | None = None
) -> ExpertPool:
    """Returns a stack of pools in another storage, as `pool_of` makes it."""
    return pool_of(
        lambda layer, ids: read_floats(pool.at_layer(layer), ids),
        pool.weights.shape[0],
        pool.num_experts,
        pool.width,
        storage,
        scales_of,
    )


class _Portions(NamedTuple):
    """Equal portions in which pools are made, so that few experts are in memory as floats.

    Attributes:
        num_experts: N, experts of a pool.
        width: D, length of their vectors.
        storage: storage of the pools.
        size: experts of a portion.
        per_pool: portions of a pool. Surplus experts of the last one are cut off.
    """

    num_experts: int
    width: int
    storage: str
    size: int
    per_pool: int

    @staticmethod
    def of(num_experts: int, width: int, storage: str) -> _Portions:
        together = experts_per_row(width, storage) if storage in CODES else 1
        # Unused places in the last row of words are filled too, but never read.
        places = -(-num_experts // together) * together
        size = math.gcd(places, EXPERTS_PER_PORTION)
        if size < FEWEST_PER_PORTION:  # avoids many small portions
            size = EXPERTS_PER_PORTION
        return _Portions(num_experts, width, storage, size, -(-places // size))

    def pool(
        self,
        floats_of: Callable[[Array], Array],
        arguments: Array,
        num_layers: int,
        scales_of: Callable[[Array, Array], Array | None] = lambda weights, argument: None,
    ) -> ExpertPool:
        """Makes a stack of pools from the floats [size, 2, D] of each portion of each layer."""
        form = array_forms(self.storage, self.num_experts, self.width)["weights"].shape
        if self.storage not in CODES:
            dtype = FLOAT_DTYPES[self.storage]
            weights = jax.lax.map(lambda each: floats_of(each).astype(dtype), arguments)
            weights = weights.reshape(num_layers, -1, *form[1:])[:, : form[0]]
            return ExpertPool.of_floats(weights)

        def packed(argument: Array) -> tuple[Array, Array]:
            weights = floats_of(argument)
            scales = scales_of(weights, argument)
            codes, scales = nearest(weights, CODES[self.storage], scales)
            return pack_experts(codes, self.storage), scales

        words, scales = jax.lax.map(packed, arguments)
        words = words.reshape(num_layers, -1, *form[1:])[:, : form[0]]
        scales = jnp.moveaxis(scales.reshape(num_layers, -1, 2), 2, 1)[:, :, : self.num_experts]
        return ExpertPool(words, scales, None, self.storage, self.num_experts, self.width)


def count_expert_parameters(pools: Any) -> int:
    """Returns the number of weights of all experts in a tree of pools."""
    leaves = jax.tree.leaves(pools, is_leaf=is_pool)
    return sum(pool.num_parameters for pool in leaves)


class MemoryReport(NamedTuple):
    """Bytes that pools take in training, by part.

    Attributes:
        parts: bytes of "codes" (or "weights" of float pools), "scales", "accumulators",
            "row statistics", "moments" (of AdamW) and "factored gradient" (which exists only
            within a step).
        parameters: number of weights of all experts.
        experts: number of experts of all layers.
    """

    parts: dict[str, int]
    parameters: int
    experts: int

    @property
    def kept(self) -> int:
        """Bytes kept between steps."""
        return sum(size for part, size in self.parts.items() if part != "factored gradient")

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes kept for each expert parameter."""
        return self.kept / self.parameters

    @property
    def experts_per_gb(self) -> float:
        """Number of experts that fit in 10^9 bytes, training state included."""
        return self.experts / self.kept * 1e9

    @property
    def adamw_bytes(self) -> int:
        """Bytes that float32 with AdamW takes: weights, two moments and the dense gradient."""
        return 16 * self.parameters


def memory_report(pools: Any, states: Any = None, gradients: Any = None) -> MemoryReport:
    """Adds up the memory of pools and of their training state.

    Args:
        pools: a tree of `ExpertPool`, with arrays or their shapes.
        states: the optimizer state. Each `UpdateState` (of `int4_accumulation`) and each
            `ExpertPool` (moments of AdamW) in it is counted.
        gradients: a tree with the `FactoredGradient`s of one step.
    """
    parts = dict.fromkeys(
        (
            "codes",
            "weights",
            "scales",
            "accumulators",
            "row statistics",
            "moments",
            "factored gradient",
        ),
        0,
    )
    all_pools = jax.tree.leaves(pools, is_leaf=is_pool)
    for pool in all_pools:
        parts["codes" if pool.is_packed else "weights"] += _bytes_of(pool.weights)
        parts["scales"] += _bytes_of(pool.scales)
    kinds = (UpdateState, ExpertPool)
    for state in jax.tree.leaves(states, is_leaf=lambda node: isinstance(node, kinds)):
        if isinstance(state, UpdateState):
            parts["accumulators"] += _bytes_of(state.accumulators)
            parts["row statistics"] += _bytes_of(state.moments)
        elif isinstance(state, ExpertPool):
            parts["moments"] += _bytes_of(state)
    parts["factored gradient"] = _bytes_of(gradients)
    layers = [pool.weights.shape[0] if pool.is_stack else 1 for pool in all_pools]
    return MemoryReport(
        {part: size for part, size in parts.items() if size},
        count_expert_parameters(pools),
        sum(count * pool.num_experts for count, pool in zip(layers, all_pools, strict=True)),
    )


def _bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
