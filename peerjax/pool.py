"""Pools of experts: their initial values and the memory they take.

`pallas_kernels.storage` knows how a pool lies in memory; everything else sees `ExpertPool`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from pallas_kernels.expert_update.integer_step import largest_code
from pallas_kernels.storage import (
    BITS,
    DOWN,
    FLOAT_DTYPES,
    STORAGES,
    UNIT,
    UP,
    ExpertPool,
    pack_experts,
    slot_words,
)

__all__ = ["STORAGES", "ExpertPool", "count_expert_parameters", "initialize_pool"]

EXPERTS_PER_DRAW = 4096
HEADROOM = 5 / 7  # of the code range, taken by the largest weight of a fresh row


def initialize_pool(
    key: Key[Array, ""],
    num_layers: int,
    num_experts: int,
    width: int,
    *,
    heads: int,
    experts_per_head: int,
    residual_scale: float = 1.0,
    storage: str = "float32",
) -> ExpertPool:
    """Draws a stack of fresh pools, a few experts at a time.

    `down ~ N(0, 1 / D)`, so that the hidden value of a unit-RMS input has unit variance, as in a
    dense MLP. The experts a head retrieves have nearly equal scores in a fresh layer (order
    statistics of many draws lie close together), so its gates are close to 1 / k, and the output
    variance of H heads is `var(up) * E[act^2] * H / k`. `up ~ N(0, residual_scale^2 * k / H)`
    makes it `residual_scale^2 * E[act^2]`, that of a dense MLP with variance-preserving
    matrices.

    Args:
        key: seeds the draws.
        num_layers: how many pools are stacked.
        num_experts: N.
        width: D.
        heads: H, routing heads that share the pool.
        experts_per_head: k.
        residual_scale: scale of the output relative to a dense MLP's.
        storage: "float32", "bfloat16", "int8" or "int4". Packed pools are drawn packed, and are the
            float pool of the same key rounded to nearest, the absolute maximum of each row of
            `down` and `up` at 5/7 of the largest code (headroom: at 7/7 every row would saturate
            at once).

    Returns:
        A stack of pools.

    Raises:
        ValueError: if the width does not pack.
    """
    std = jnp.array([[0.0], [0.0]])
    std = std.at[DOWN].set(width**-0.5)
    std = std.at[UP].set(residual_scale * math.sqrt(experts_per_head / heads))
    packed = storage in BITS
    slots_per_row = max(1, UNIT // slot_words(width, storage)) if packed else 1
    # Slots that are left over in the last row are drawn too, and never read.
    slots = -(-num_experts // slots_per_row) * slots_per_row
    per_draw = math.gcd(slots, EXPERTS_PER_DRAW)
    keys = jax.random.split(key, num_layers * slots // per_draw)

    def draw_floats(key: Array) -> Array:
        return std * jax.random.normal(key, (per_draw, 2, width))

    if not packed:
        dtype = FLOAT_DTYPES[storage]
        weights = jax.lax.map(lambda key: draw_floats(key).astype(dtype), keys)
        return ExpertPool.of_floats(weights.reshape(num_layers, num_experts, 2, width))

    def draw_packed(key: Array) -> tuple[Array, Array]:
        floats = draw_floats(key)
        peak = largest_code(BITS[storage]) * HEADROOM
        scales = jnp.max(jnp.abs(floats), axis=-1) / peak
        codes = jnp.round(floats / scales[..., None]).astype(jnp.int32)
        return pack_experts(codes, storage), scales

    words, scales = jax.lax.map(draw_packed, keys)
    words = words.reshape(num_layers, -1, *words.shape[2:])
    scales = jnp.moveaxis(scales.reshape(num_layers, slots, 2), 2, 1)[:, :, :num_experts]
    return ExpertPool(words, scales, None, storage, num_experts, width)


def count_expert_parameters(pools: Any) -> int:
    """Weights of all experts in a tree of pools."""
    leaves = jax.tree.leaves(pools, is_leaf=lambda node: isinstance(node, ExpertPool))
    return sum(pool.num_parameters for pool in leaves)
