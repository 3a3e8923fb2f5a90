"""Shared code of all formats: names of the leaves of trees, and safetensors files."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from peerjax.atomic import replace_whole
from peerjax.errors import UserError


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, joined by dots.

    Raises:
        UserError: if two leaves have the same name.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    named: dict[str, Any] = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in named:
            raise UserError(f"two leaves of the tree have the name {name!r}")
        named[name] = leaf
    return named


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Any], metadata: dict[str, str]
) -> None:
    """Writes a safetensors file. An existing file is unchanged if this fails.

    Raises:
        UserError: if the file cannot be written.
    """
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        replace_whole(path, lambda to: safetensors.numpy.save_file(arrays, to, metadata))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {os.fspath(path)} as safetensors: {error}") from None
