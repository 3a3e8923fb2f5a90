"""Functions that every device of a mesh runs on its part of the operands."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


def size_of_mesh() -> int:
    """Returns the number of devices of the current mesh, or 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def over_mesh(function: Function, in_specs: Any, out_specs: Any) -> Function:
    """Maps a function over the current mesh; without a mesh, returns the function itself.

    Args:
        function: function of positional operands, from parts of arrays to parts of arrays.
        in_specs: a `PartitionSpec`, or a tree of them, for each operand.
        out_specs: a `PartitionSpec`, or a tree of them, for each result.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    # No check_vma, because a custom backward pass cannot state which cotangents vary over an axis.
    # Kernels cannot be partitioned, so `shard_map` declares that there is nothing to partition.
    return jax.shard_map(function, check_vma=False, in_specs=in_specs, out_specs=out_specs)
