"""Dense weights, which are split over `fsdp` and gathered where they are used."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from peerjax.sharding.rules import FSDP, largest

# Name of gathered weights for policies of `jax.checkpoint`. Gathering again takes no memory.
GATHERED = "gathered_weights"


def are_split() -> bool:
    """Returns whether the current mesh splits dense weights."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and dict(mesh.shape).get(FSDP, 1) > 1


def gathered(params: Any) -> Any:
    """Returns weights that every device has whole. Their gradients are split like the weights.

    Without this, the compiler may move activations and leave the weights split.

    Args:
        params: weights of one block, or of modules outside blocks. Only float arrays are gathered.
    """
    if not are_split():
        return params
    mesh = jax.sharding.get_abstract_mesh()

    def gather(leaf: Any) -> Any:
        spec = largest("", leaf, mesh) if jnp.issubdtype(leaf.dtype, jnp.floating) else P()
        return leaf if spec == P() else checkpoint_name(_whole(spec, leaf), GATHERED)

    return jax.tree.map(gather, params)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole(spec: P, leaf: Array) -> Array:
    return jax.lax.with_sharding_constraint(leaf, P())


def _whole_forward(spec: P, leaf: Array) -> tuple[Array, None]:
    return _whole(spec, leaf), None


def _whole_backward(spec: P, _: None, gradient: Array) -> tuple[Array]:
    # First whole, so that the sum over devices is not computed along the parts of the weights. The
    # compiler joins the sum and the split.
    gradient = jax.lax.with_sharding_constraint(gradient, P())
    return (jax.lax.with_sharding_constraint(gradient, spec),)


_whole.defvjp(_whole_forward, _whole_backward)
