"""Functions that every device of a mesh runs on its part of the operands."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


def over_mesh(function: Function, in_specs: Any, out_specs: Any) -> Function:
    """Maps a function over the current mesh; without a mesh, returns the function itself.

    Args:
        function: of positional operands, from parts of arrays to parts of arrays.
        in_specs: for each operand, a `PartitionSpec` or a tree of them.
        out_specs: the same for the results.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    # check_vma: a custom backward cannot state which cotangents vary over which axis, and a kernel
    # cannot be partitioned: that there is nothing to partition must be said.
    return jax.shard_map(function, check_vma=False, in_specs=in_specs, out_specs=out_specs)
