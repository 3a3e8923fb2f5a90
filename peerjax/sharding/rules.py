"""The placement rules: which array is split over which axis of the mesh.

The mesh has one axis so far, `data`: batches are split over it and everything else is
replicated. A rule is a pattern on the path of a leaf in the train state (such as
`params/run_0/block/attention/query/kernel`) and the partition of its dimensions; the first
pattern that matches decides.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data",)
BATCH = P("data")
RULES: tuple[tuple[str, P], ...] = ((r".*", P()),)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices (all of them by default) along the axes of the mesh."""
    devices = jax.devices() if devices is None else devices
    # Auto, because under Explicit (the default) indexing a sharded array needs annotations.
    return jax.make_mesh((len(devices),), AXES, axis_types=(AxisType.Auto,), devices=devices)


def sharding_of(mesh: Mesh, spec: P) -> NamedSharding:
    """The sharding that `spec` means on `mesh`."""
    return NamedSharding(mesh, spec)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The sharding of every leaf of a train state, by the first rule that matches its path."""

    def of_leaf(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(spec for pattern, spec in RULES if re.fullmatch(pattern, name))
        return sharding_of(mesh, spec)

    return jax.tree_util.tree_map_with_path(of_leaf, state)
