"""The placement rules: which array is split over which axis of the mesh.

The mesh has one axis so far, `data`. Batches are split over it, and everything else is replicated.
A rule maps the path of a leaf in the train state (such as
`params/run_0/block/attention/query/kernel`), its shape and the mesh to a partition of its
dimensions. The first rule whose pattern matches the path applies.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Rule = Callable[[str, jax.ShapeDtypeStruct, Mesh], P]
AXES = ("data",)
BATCH = P("data")


def replicated(path: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> P:
    """Every device has the whole array."""
    return P()


RULES: tuple[tuple[str, Rule], ...] = ((r".*", replicated),)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices (all of them by default) along the axes of the mesh."""
    devices = jax.devices() if devices is None else devices
    # Auto, because under Explicit (the default) indexing a sharded array needs annotations.
    return jax.make_mesh((len(devices),), AXES, axis_types=(AxisType.Auto,), devices=devices)


def sharding_of(mesh: Mesh, spec: P) -> NamedSharding:
    """Returns the sharding of `spec` on `mesh`."""
    return NamedSharding(mesh, spec)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Returns the sharding of every leaf of a train state, by the first rule that matches."""

    def of_leaf(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rule = next(rule for pattern, rule in RULES if re.fullmatch(pattern, name))
        return sharding_of(mesh, rule(name, leaf, mesh))

    return jax.tree_util.tree_map_with_path(of_leaf, state)
