"""Rounds the pools of a model to codes, with scales that are searched on calibration text.

Scales that minimise the squared error of weights raise the loss, so the loss itself decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.codes import CODES, Code
from pallas_kernels.expert_update.integer_step import target_scales
from pallas_kernels.storage import DOWN, UP, ExpertPool
from peerjax.pool import stored_as

# Candidates for the scale of a vector: these times the scale of training, and after them
# max |weight| / top, with which no weight is clipped.
MULTIPLES = (0.7, 0.85, 1.0, 1.2, 1.45)
OF_TRAINING, OF_LARGEST = MULTIPLES.index(1.0), len(MULTIPLES)


def scales_of(
    weights: Float[Array, "n 2 D"], code: Code, chosen: Int[Array, "2"]
) -> Float[Array, "n 2"]:
    """Returns the scales of experts by the candidates that are chosen for `down` and `up`."""
    of_training = target_scales(weights, code)
    of_largest = jnp.max(jnp.abs(weights), axis=-1) / code.top
    candidates = jnp.stack([multiple * of_training for multiple in MULTIPLES] + [of_largest])
    found = jnp.take_along_axis(candidates, chosen[None, None, :], axis=0)[0]
    return jnp.where(found > 0, found, of_training)  # a vector of zeros


def search_scales(
    pools: dict[str, dict[str, ExpertPool]],
    storage: str,
    loss_of: Callable[[Any], float],
) -> tuple[dict[str, dict[str, ExpertPool]], dict[str, Any]]:
    """Rounds pools with the scales that give the lowest loss, one layer and matrix after another.

    Args:
        pools: pools by stack and name, of any storage.
        storage: a format of `pallas_kernels.codes`.
        loss_of: function that returns the loss of the model with given pools.

    Returns:
        The rounded pools, and the chosen multiple of the scale of training for each layer and
        matrix by the path of the pool. "largest" stands for max |weight| / top.
    """
    round_pool = jax.jit(_rounded, static_argnums=1)
    chosen = {
        (stack, name): np.full((pool.weights.shape[0], 2), OF_TRAINING)
        for stack, of_stack in pools.items()
        for name, pool in of_stack.items()
    }
    best: dict[str, dict[str, ExpertPool]] = {stack: {} for stack in pools}
    for (stack, name), of_pool in chosen.items():
        best[stack][name] = round_pool(pools[stack][name], storage, jnp.asarray(of_pool))
    least = loss_of(best)
    for (stack, name), of_pool in chosen.items():
        for layer, matrix in np.ndindex(of_pool.shape):
            for candidate in range(len(MULTIPLES) + 1):
                if candidate == OF_TRAINING:
                    continue
                tried = of_pool.copy()
                tried[layer, matrix] = candidate
                pool = round_pool(pools[stack][name], storage, jnp.asarray(tried))
                loss = loss_of({**best, stack: {**best[stack], name: pool}})
                if loss < least:
                    least, best[stack][name] = loss, pool
                    of_pool[layer, matrix] = candidate
    return best, {
        f"{stack}/{name}": [
            {matrix: _name_of(layer[place]) for matrix, place in (("down", DOWN), ("up", UP))}
            for layer in of_pool
        ]
        for (stack, name), of_pool in chosen.items()
    }


def _rounded(pool: ExpertPool, storage: str, chosen: Int[Array, "layers 2"]) -> ExpertPool:
    def of_portion(weights: Array, layer: Array) -> Array:
        return scales_of(weights, CODES[storage], chosen[layer])

    return stored_as(pool, storage, of_portion)


def _name_of(candidate: int) -> float | str:
    return "largest" if candidate == OF_LARGEST else MULTIPLES[candidate]
