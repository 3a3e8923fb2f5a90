"""How the experts of a pool lie in memory. The only module that knows.

`down` and `up` of one expert are adjacent, so that an expert is one contiguous read. The pools
of equal layers are stacked in one array; a layer is chosen by index at the moment of reading,
never by slicing, because a slice inside `lax.scan` copies the whole pool.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DOWN, UP = 0, 1


class ExpertPool(NamedTuple):
    """All experts of a layer, or of a stack of equal layers.

    Attributes:
        weights: [N, 2, D], or [layers, N, 2, D] for a stack; float32 or bfloat16.
            Index 0 of the third axis from the right is `down`, index 1 is `up`.
        layer: which layer of a stack to read; `None` for a pool that is no stack.
    """

    weights: Float[Array, "*layers N 2 D"]
    layer: Int[Array, ""] | None = None

    @property
    def num_experts(self) -> int:
        """N, also the sentinel id that stands for "no expert"."""
        return self.weights.shape[-3]

    @property
    def width(self) -> int:
        """D, the width of the model."""
        return self.weights.shape[-1]

    def at_layer(self, layer: Int[Array, ""]) -> ExpertPool:
        """The same storage, read at `layer`. Copies nothing."""
        return self._replace(layer=layer)


def read_experts(
    pool: ExpertPool, ids: Int[Array, "*K"]
) -> tuple[Float[Array, "*K D"], Float[Array, "*K D"]]:
    """Reads experts as float32.

    Args:
        pool: a pool of one layer, or a stack with its `layer` chosen.
        ids: expert numbers in [0, N). Any other number reads zeros.

    Returns:
        `(down, up)`, float32.
    """
    # Out-of-range ids must not wrap (negative) and must not clamp (too large).
    safe_ids = jnp.where(ids < 0, pool.num_experts, ids)
    index = safe_ids if pool.layer is None else (pool.layer, safe_ids)
    rows = pool.weights.at[index].get(mode="fill", fill_value=0).astype(jnp.float32)
    return rows[..., DOWN, :], rows[..., UP, :]


def add_to_experts(
    weights: Float[Array, "*layers N 2 D"],
    layer: Int[Array, ""] | None,
    ids: Int[Array, " M"],
    down: Float[Array, "M D"],
    up: Float[Array, "M D"],
) -> Float[Array, "*layers N 2 D"]:
    """Adds rows to an array laid out like `ExpertPool.weights`; ids may repeat.

    Ids outside [0, N) are dropped.
    """
    safe_ids = jnp.where(ids < 0, weights.shape[-3], ids)
    index = safe_ids if layer is None else (layer, safe_ids)
    rows = jnp.stack([down, up], axis=1).astype(weights.dtype)
    return weights.at[index].add(rows, mode="drop")
