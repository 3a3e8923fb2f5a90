"""Optax transforms of dense gradients, applied to pools that have factored gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from pallas_kernels.factored_gradient import FactoredGradient
from pallas_kernels.storage import ExpertPool, is_pool
from peerjax.optim.overwrite import Overwrite
from peerjax.sharding.updates import dense_pool_gradient


def on_dense_gradients(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wraps a transform of dense gradients, so that it takes factored gradients of pools.

    A dense gradient is a float pool, as large as the pool. Use this for comparison with
    `int4_accumulation`, not for large pools. Gradients of other parameters pass through.

    If no gradient of a pool hits an expert, pools do not change. State of the transform in the form
    of pools does not change either. `int4_accumulation` does the same.

    Args:
        inner: transform such as `optax.adamw` for float pools, or `eco` for packed pools.

    Returns:
        The transform. Its `update` raises a ValueError without params.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from pallas_kernels.factored_gradient import FactoredGradient
        >>> from peerjax import optim
        >>> from peerjax.pool import initialize_pool
        >>> pool = initialize_pool(jax.random.key(0), 1, 64, 16)
        >>> ones = jnp.ones((1, 2, 3))
        >>> gradient = FactoredGradient(
        ...     jnp.arange(6).reshape(1, 2, 3), ones, ones, *jnp.ones((2, 1, 2, 16)))
        >>> transform = optim.on_dense_gradients(optax.adamw(1e-3))
        >>> updates, state = transform.update(gradient, transform.init(pool), pool)
        >>> pool = optim.apply_updates(pool, updates)
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "on_dense_gradients needs the params: call update(updates, state, params)"
            )
        leaves, structure = _flatten(params)
        gradients = structure.flatten_up_to(updates)
        factored = [each for each in gradients if isinstance(each, FactoredGradient)]
        hits = _hits(factored)
        dense = [
            _dense(leaf, gradient) if isinstance(gradient, FactoredGradient) else gradient
            for leaf, gradient in zip(leaves, gradients, strict=True)
        ]
        changes, new_state = inner.update(structure.unflatten(dense), state, params, **extra)
        changes = [
            _only_if(hits, change, leaf) if is_pool(leaf) else change
            for leaf, change in zip(leaves, structure.flatten_up_to(changes), strict=True)
        ]

        def keep(new: Any, old: Any) -> Any:
            return _where(hits, new, old) if is_pool(new) else new

        new_state = jax.tree.map(keep, new_state, state, is_leaf=is_pool)
        return structure.unflatten(changes), new_state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _flatten(params: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(params, is_leaf=is_pool)


def _hits(gradients: list[FactoredGradient]) -> Bool[Array, ""]:
    found = [jnp.any(each != 0) for own in gradients for each in (own.c_down, own.c_up)]
    return jnp.any(jnp.stack(found)) if found else jnp.bool_(True)


def _dense(pool: ExpertPool, gradient: FactoredGradient) -> ExpertPool:
    """Returns the gradient in the dtype of a float pool, or in float32 for a packed pool."""
    weights = dense_pool_gradient(gradient, pool.num_experts)
    return ExpertPool.of_floats(weights if pool.is_packed else weights.astype(pool.weights.dtype))


def _only_if(condition: Array, change: Any, pool: ExpertPool) -> Any:
    if isinstance(change, Overwrite):
        return Overwrite(_where(condition, change.value, pool))
    weights = jnp.where(condition, change.weights, 0)
    return dataclasses.replace(change, weights=weights)


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)
