"""Pools of experts: their initial values and the memory they take.

`pallas_kernels.storage` knows how a pool lies in memory; everything else sees `ExpertPool`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from pallas_kernels.storage import DOWN, UP, ExpertPool, read_experts

__all__ = ["STORAGE_DTYPES", "ExpertPool", "initialize_pool", "read_experts"]

STORAGE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
EXPERTS_PER_DRAW = 4096


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
        storage: "float32" or "bfloat16".

    Returns:
        A pool with weights [num_layers, N, 2, D].
    """
    dtype = STORAGE_DTYPES[storage]
    std = jnp.array([[0.0], [0.0]])
    std = std.at[DOWN].set(width**-0.5)
    std = std.at[UP].set(residual_scale * math.sqrt(experts_per_head / heads))
    per_draw = math.gcd(num_experts, EXPERTS_PER_DRAW)

    def draw(key: Array) -> Array:
        return (std * jax.random.normal(key, (per_draw, 2, width))).astype(dtype)

    keys = jax.random.split(key, num_layers * num_experts // per_draw)
    weights = jax.lax.map(draw, keys)
    return ExpertPool(weights.reshape(num_layers, num_experts, 2, width))
