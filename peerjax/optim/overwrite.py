"""Updates that replace a parameter instead of being added to it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pallas_kernels.storage import ExpertPool
from peerjax.optim.packed_matrix import PackedMatrix


class Overwrite(NamedTuple):
    """An update that is the whole new value, written in place of the donated old one."""

    value: Any


def apply_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """Adds updates as `optax.apply_updates` does, and puts the value of every `Overwrite` in place.

    Args:
        params: a tree of arrays and pools.
        updates: a tree of the same structure, with an `Overwrite` for each pool.

    Returns:
        The new params.

    Raises:
        ValueError: if floats would be added to the codes of a pool or of a packed matrix, or would
            replace the codes.
    """

    def apply(path: Any, param: Any, update: Any) -> Any:
        if isinstance(update, Overwrite) and _are_alike(update.value, param):
            return update.value
        if isinstance(update, Overwrite) or (isinstance(param, ExpertPool) and param.is_packed):
            raise ValueError(
                f"the update of the pool {jax.tree_util.keystr(path)} is not an Overwrite with a "
                "pool of the same form; int4_accumulation must come last in the chain that updates "
                "pools"
            )
        if isinstance(param, PackedMatrix) and not _is_difference(update):
            raise ValueError(
                f"the update of the packed matrix {jax.tree_util.keystr(path)} is not a difference "
                "of words; int4_accumulation must come last in the chain that updates it, and "
                "matrices that are not trained must be left out of the tree"
            )
        return optax.apply_updates(param, update)

    return jax.tree_util.tree_map_with_path(
        apply, params, updates, is_leaf=lambda node: isinstance(node, ExpertPool | PackedMatrix)
    )


def _are_alike(new: Any, old: Any) -> bool:
    """Returns whether two trees have the same structure, shapes and types."""

    def form(tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]

    return bool(form(new) == form(old))


def _is_difference(update: Any) -> bool:
    return isinstance(update, PackedMatrix) and jnp.issubdtype(update.words.dtype, jnp.integer)
