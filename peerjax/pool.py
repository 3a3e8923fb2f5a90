"""Pools of experts: their initial values and the memory they take.

`pallas_kernels.storage` defines the memory layout of a pool. All other code uses `ExpertPool`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from pallas_kernels.codes import CODES
from pallas_kernels.expert_update import UpdateState
from pallas_kernels.expert_update.integer_step import nearest
from pallas_kernels.storage import (
    DOWN,
    FLOAT_DTYPES,
    UP,
    ExpertPool,
    array_forms,
    experts_per_row,
    pack_experts,
)

EXPERTS_PER_DRAW, FEWEST_PER_DRAW = 4096, 256


def initialize_pool(
    key: Key[Array, ""],
    num_layers: int,
    num_experts: int,
    width: int,
    *,
    residual_scale: float = 1.0,
    storage: str = "float32",
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

    Returns:
        A stack of pools.

    Raises:
        ValueError: if the width does not fill whole words of codes, or the storage is unknown.
    """
    form = array_forms(storage, num_experts, width)["weights"].shape
    std = jnp.array([[0.0], [0.0]])
    std = std.at[DOWN].set(width**-0.5)
    std = std.at[UP].set(residual_scale * width**-0.5)
    packed = storage in CODES
    together = experts_per_row(width, storage) if packed else 1
    # Unused places in the last row of words are drawn too, but never read.
    places = -(-num_experts // together) * together
    per_draw = math.gcd(places, EXPERTS_PER_DRAW)
    if per_draw < FEWEST_PER_DRAW:  # avoids many small draws; surplus experts are cut off
        per_draw = EXPERTS_PER_DRAW
    draws = -(-places // per_draw)
    keys = jax.random.split(key, num_layers * draws)

    def draw_floats(key: Array) -> Array:
        return std * jax.random.normal(key, (per_draw, 2, width))

    if not packed:
        dtype = FLOAT_DTYPES[storage]
        weights = jax.lax.map(lambda key: draw_floats(key).astype(dtype), keys)
        weights = weights.reshape(num_layers, -1, *form[1:])[:, : form[0]]
        return ExpertPool.of_floats(weights)

    def draw_packed(key: Array) -> tuple[Array, Array]:
        codes, scales = nearest(draw_floats(key), CODES[storage])
        return pack_experts(codes, storage), scales

    words, scales = jax.lax.map(draw_packed, keys)
    words = words.reshape(num_layers, -1, *form[1:])[:, : form[0]]
    scales = jnp.moveaxis(scales.reshape(num_layers, -1, 2), 2, 1)[:, :, :num_experts]
    return ExpertPool(words, scales, None, storage, num_experts, width)


def count_expert_parameters(pools: Any) -> int:
    """Returns the number of weights of all experts in a tree of pools."""
    leaves = jax.tree.leaves(pools, is_leaf=lambda node: isinstance(node, ExpertPool))
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
    all_pools = jax.tree.leaves(pools, is_leaf=lambda node: isinstance(node, ExpertPool))
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
