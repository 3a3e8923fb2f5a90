"""Batches over a mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from peerjax.sharding.rules import BATCH, sharding_of


def split_rows(batch: Any, parts: int) -> Any:
    """Reshapes [B, ...] to [parts, B / parts, ...]; each part is split over all devices."""

    def split(leaf: Array) -> Array:
        leaf = leaf.reshape(parts, -1, *leaf.shape[1:])
        if jax.sharding.get_abstract_mesh().empty:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, P(None, *BATCH))

    return jax.tree.map(split, batch)


def over_batch(x: Array) -> Array:
    """Declares that rows of an array are split over the mesh, so that weights are gathered."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Places a process's rows on the mesh as its part of the global batch."""
    sharding = sharding_of(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, leaf) for name, leaf in batch.items()
    }


def get_whole(tree: Any) -> Any:
    """Returns arrays of the current mesh as host arrays, which every process gets whole."""

    def get(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(get, tree)


def put_whole(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Places a batch on the mesh. Every process must have the whole batch."""
    sharding = sharding_of(mesh, BATCH)
    return {
        name: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)
        for name, leaf in batch.items()
    }
