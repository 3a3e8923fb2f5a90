"""Dense weights where they are used: whole on every device, with gradients that are split."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from peerjax.sharding.rules import FSDP, has_our_axes, largest_over_all

# Name of gathered weights for policies of `jax.checkpoint`. Gathering again takes no memory.
GATHERED = "gathered_weights"


def are_split() -> bool:
    """Returns whether the current mesh splits dense weights."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and dict(mesh.shape).get(FSDP, 1) > 1


def have_split_gradients() -> bool:
    """Returns whether the current mesh splits gradients and moments of dense weights."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and has_our_axes(mesh)


def whole(params: Any) -> Any:
    """Returns weights that every device has whole, and whose gradients are split like moments.

    Without this, the compiler may move activations and leave weights split. And every device would
    have the gradients of all layers whole, where it needs only its part.

    Args:
        params: weights of one block, or of modules outside blocks. Only float arrays change.
    """
    if not have_split_gradients():
        return params
    mesh = jax.sharding.get_abstract_mesh()

    def use(leaf: Any) -> Any:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        spec = largest_over_all("", leaf, mesh) if is_float else P()
        if spec == P():
            return leaf
        leaf = _whole(are_split(), spec, leaf)
        return checkpoint_name(leaf, GATHERED) if are_split() else leaf

    return jax.tree.map(use, params)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole(is_split: bool, of_gradient: P, leaf: Array) -> Array:
    return jax.lax.with_sharding_constraint(leaf, P()) if is_split else leaf


def _whole_forward(is_split: bool, of_gradient: P, leaf: Array) -> tuple[Array, None]:
    return _whole(is_split, of_gradient, leaf), None


def _whole_backward(is_split: bool, of_gradient: P, _: None, gradient: Array) -> tuple[Array]:
    # First whole, so that the sum over devices is not computed along the parts of the weights. The
    # compiler joins the sum and the split.
    gradient = jax.lax.with_sharding_constraint(gradient, P())
    return (jax.lax.with_sharding_constraint(gradient, of_gradient),)


_whole.defvjp(_whole_forward, _whole_backward)
