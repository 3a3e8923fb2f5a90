"""The mesh and the placement rules: which array is split over which axis.

The axes of the mesh are `data`, `fsdp` and `expert`. Rows of a batch are split over all three.
Dense parameters are split over `fsdp`, and gathered where they are used. Their gradients and
moments are split over all three, because a device needs only those of its own part. Pools are split
over `expert`: a device has a contiguous range of expert numbers.

A rule maps the path of a node in the train state (such as
`params/run_0/block/attention/query/kernel`), its shapes and the mesh to a partition of its
dimensions. A node is an array, or a pool or its state with several arrays. The first rule whose
pattern matches the path applies.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.expert_update import UpdateState
from pallas_kernels.storage import ExpertPool, splits_into
from peerjax.errors import ConfigError
from peerjax.stacks import is_stacked

Rule = Callable[[str, Any, Any], Any]
DATA, FSDP, EXPERT = "data", "fsdp", "expert"
AXES = (DATA, FSDP, EXPERT)
BATCH = P(AXES)


def make_mesh(
    devices: Sequence[jax.Device] | None = None, *, data: int = -1, fsdp: int = 1, expert: int = 1
) -> Mesh:
    """Arranges devices along the axes of the mesh.

    Args:
        devices: the devices; all of them by default.
        data: size of the axis; -1 takes the devices that are left. Of several -1, the last does.
        fsdp: likewise.
        expert: likewise.

    Raises:
        ValueError: if the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = complete_sizes((data, fsdp, expert), len(devices))
    # Auto, because under Explicit (the default) indexing a sharded array needs annotations.
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)


def mesh_for(config: ml_collections.ConfigDict) -> Mesh:
    """Arranges all devices as `config.mesh` says.

    Raises:
        ConfigError: if the sizes do not fit the number of devices.
    """
    try:
        return make_mesh(**config.mesh)
    except ValueError as error:
        raise ConfigError(f"{error}; set --config.mesh.data=-1, or other sizes") from None


def mesh_of_run(config: ml_collections.ConfigDict) -> Mesh:
    """Arranges all devices as a run did, or along `data` if there are not as many of them."""
    try:
        return mesh_for(config)
    except ConfigError:
        return make_mesh()


def complete_sizes(sizes: tuple[int, int, int], devices: int) -> tuple[int, int, int]:
    """Returns the sizes of the axes, with the devices that are left in place of the last -1.

    Raises:
        ValueError: if the sizes do not fit the number of devices.
    """
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh sizes {named} are not positive or -1")
    fixed = math.prod(size for size in sizes if size != -1)
    if devices % fixed or (-1 not in sizes and fixed != devices):
        raise ValueError(
            f"mesh sizes {named} do not fit {devices} device{'s' if devices > 1 else ''}"
        )
    complete, left = [], devices // fixed
    for size in reversed(sizes):
        complete.append(left if size == -1 else size)
        left = 1 if size == -1 else left
    expert, fsdp, data = complete
    return data, fsdp, expert


def shards_of_pool(num_experts: int, mesh: Any) -> int:
    """Returns into how many parts a mesh splits a pool.

    A pool is not split if equal parts would not have whole units. Other meshes than `make_mesh`
    makes split none.
    """
    size = mesh.shape[EXPERT] if has_our_axes(mesh) else 1
    return size if splits_into(num_experts, size) else 1


def has_our_axes(mesh: Any) -> bool:
    """Returns whether a mesh has the axes of `make_mesh`."""
    return tuple(mesh.axis_names) == AXES


def pool_specs(pool: ExpertPool, mesh: Any) -> ExpertPool:
    """Returns the partition of a pool or of a stack of pools, as a tree like it."""
    axes = _expert_axes(pool.num_experts, mesh)
    layers = (None,) if pool.is_stack else ()
    return dataclasses.replace(
        pool,
        weights=P(*layers, *axes),
        scales=None if pool.scales is None else P(*layers, None, *axes),
        layer=None if pool.layer is None else P(),
    )


def state_specs(state: UpdateState, mesh: Any) -> UpdateState:
    """Returns the partition of the optimizer state of a stack of pools, as a tree like it."""
    axes = _expert_axes(state.moments.shape[-1], mesh)
    accumulators = None if state.accumulators is None else P(None, *axes)
    moments: Any = P(None, None, *axes)
    return UpdateState(accumulators, moments)


def _expert_axes(num_experts: int, mesh: Any) -> tuple[str, ...]:
    return (EXPERT,) if shards_of_pool(num_experts, mesh) > 1 else ()


def of_pool(path: str, node: Any, mesh: Any) -> Any:
    """Splits a pool, or its state, along the numbers of experts."""
    if isinstance(node, ExpertPool):
        return pool_specs(node, mesh)
    if isinstance(node, UpdateState):
        return state_specs(node, mesh)
    return P()


def largest(path: str, node: Any, mesh: Any) -> P:
    """Splits the largest dimension of a float array that can be split, but not that of layers."""
    size = dict(mesh.shape).get(FSDP, 1)
    first = 1 if is_stacked(path) else 0
    fits = [axis for axis in range(first, len(node.shape)) if node.shape[axis] % size == 0]
    is_float = jnp.issubdtype(node.dtype, jnp.floating)
    if size == 1 or len(node.shape) - first < 2 or not fits or not is_float:
        return P()
    axis = max(fits, key=lambda axis: node.shape[axis])
    return P(*[None] * axis, FSDP)


def largest_over_all(path: str, node: Any, mesh: Any) -> P:
    """Splits the dimension that `largest` splits, over all axes if it can be, else over `fsdp`.

    If `largest` splits none, this splits the largest one that can be split over all axes.
    """
    first = 1 if is_stacked(path) else 0
    of_parameter = largest(path, node, mesh)
    axes = [len(of_parameter) - 1] if of_parameter else range(first, len(node.shape))
    fits = [axis for axis in axes if node.shape[axis] % mesh.size == 0]
    if mesh.size == 1 or len(node.shape) - first < 2 or not fits:
        return of_parameter
    axis = max(fits, key=lambda axis: node.shape[axis])
    # `fsdp` is first, so that every part is within the device's part of the parameter.
    return P(*[None] * axis, (FSDP, DATA, EXPERT))


def replicated(path: str, node: Any, mesh: Any) -> Any:
    """Every device has the whole array, or all arrays of an `UpdateState`."""
    return jax.tree.map(lambda leaf: P(), node)


RULES: tuple[tuple[str, Rule], ...] = (
    (r"params/.*", largest),
    (r"opt_state/.*/(mu|nu)/params/.*", largest_over_all),
    (r"opt_state/.*/params/.*", replicated),  # of packed matrices, which the transform updates
    (r"(.*/)?pools(/.*)?", of_pool),
    (r".*", replicated),
)


def sharding_of(mesh: Mesh, spec: P) -> NamedSharding:
    """Returns the sharding of `spec` on `mesh`."""
    return NamedSharding(mesh, spec)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Returns the sharding of every leaf of a train state, by the first rule that matches."""
    return jax.tree.map(
        lambda spec: sharding_of(mesh, spec),
        _partitions(mesh, state),
        is_leaf=lambda spec: isinstance(spec, P),
    )


def in_place(state: Any) -> Any:
    """Declares that every leaf of a train state is where the rules place it on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return state
    return jax.lax.with_sharding_constraint(state, _partitions(mesh, state))


def _partitions(mesh: Any, state: Any) -> Any:
    def of_node(path: Any, node: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rule = next(rule for pattern, rule in RULES if re.fullmatch(pattern, name))
        return rule(name, node, mesh)

    return jax.tree_util.tree_map_with_path(
        of_node, state, is_leaf=lambda node: isinstance(node, ExpertPool | UpdateState)
    )
