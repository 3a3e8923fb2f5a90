"""Splitting of batches over a mesh."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from peerjax.sharding.rules import BATCH


def split_rows(batch: Any, parts: int) -> Any:
    """Reshapes [B, ...] to [parts, B / parts, ...]; each part is split over all devices."""

    def split(leaf: Array) -> Array:
        leaf = leaf.reshape(parts, -1, *leaf.shape[1:])
        if jax.sharding.get_abstract_mesh().empty:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, P(None, *BATCH))

    return jax.tree.map(split, batch)
