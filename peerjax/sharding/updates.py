"""Updates of pools over a mesh; see `peerjax.sharding.lookups`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels.expert_update import Hyperparameters, Statistics, UpdateState, update
from pallas_kernels.factored_gradient import FactoredGradient, clip_factor
from pallas_kernels.storage import ExpertPool
from peerjax.sharding.exchange import Dispatch, Gather, dispatch_for, exchanged
from peerjax.sharding.lookups import sent_ids
from peerjax.sharding.over_mesh import over_mesh
from peerjax.sharding.rules import (
    AXES,
    DATA,
    EXPERT,
    FSDP,
    has_our_axes,
    pool_specs,
    shards_of_pool,
    state_specs,
)

# Pairs of all tokens from which a device leaves out others' pairs before it sorts its own ones.
MANY_PAIRS = 1 << 20


def sharded_update(
    pool: ExpertPool,
    state: UpdateState,
    gradient: FactoredGradient,
    hyperparameters: Hyperparameters,
    *,
    seed: Any,
    step: Any,
    clip_norm: Any = None,
    accumulator_bits: int | None = None,
    implementation: str | None = None,
    exchange: str | None = None,
) -> tuple[ExpertPool, UpdateState, Statistics]:
    """Runs `pallas_kernels.expert_update.update` of a stack of pools over the mesh.

    Each device receives the gradient of its experts from all tokens, one layer at a time, and
    rewrites them. No device ever has this gradient of several layers.
    Devices with the same experts receive the same gradient, and draw the same random bits. These
    depend on numbers in the whole pool, so they are the same on every mesh.

    Args:
        pool: a stack of pools, or one pool. One pool is not split, and the whole gradient is
            gathered on every device. The same holds on meshes of other axes.
        state: its state.
        gradient: its gradient.
        hyperparameters: numbers of the rule.
        seed: as in `update`.
        step: as in `update`.
        clip_norm: bound on the norm of the gradient of the whole stack; `None` for no bound.
        accumulator_bits: as in `update`.
        implementation: as in `update`.
        exchange: as in `peerjax.sharding.lookups.sharded_lookup`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    step_of_pool = partial(
        update, seed=seed, accumulator_bits=accumulator_bits, implementation=implementation
    )
    if mesh.size <= 1 or not has_our_axes(mesh) or not pool.is_stack:

        def whole(step, pool, state, gradient, rule):
            if clip_norm is not None:
                gradient = gradient.clip(clip_norm, pool.num_experts)
            return step_of_pool(pool, state, gradient, rule, step=step)

        everywhere = gather_tokens(gradient)
        return over_mesh(whole, P(), P())(step, pool, state, everywhere, hyperparameters)

    receive = partial(_with_received, exchange, shards_of_pool(pool.num_experts, mesh))
    part = partial(_update_part, step_of_pool, clip_norm, receive)
    of_pool, of_state = pool_specs(pool, mesh), state_specs(state, mesh)
    specs = (P(), of_pool, of_state, P(None, AXES), P())
    mapped = over_mesh(part, specs, (of_pool, of_state, P()))
    return mapped(step, pool, state, gradient, hyperparameters)


def _update_part(
    step_of_pool: Callable[..., Any],
    clip_norm: Any,
    receive: Callable[..., Any],
    step: Any,
    whole: ExpertPool,
    state: UpdateState,
    gradient: FactoredGradient,
    rule: Hyperparameters,
) -> tuple[ExpertPool, UpdateState, Statistics]:
    """Updates this device's experts, inside `jax.shard_map`, one layer after the other."""
    layers, size = gradient.ids.shape[0], state.moments.shape[-1]
    pool = dataclasses.replace(whole, num_experts=size)
    is_split = size < whole.num_experts
    first_expert = jax.lax.axis_index(EXPERT) * size if is_split else 0
    of_all_parts = partial(jax.lax.psum, axis_name=EXPERT) if is_split else lambda leaf: leaf
    with_received = partial(receive, gradient, size)
    factor = jnp.float32(1)
    if clip_norm is not None:

        def add_square(layer: Array, total: Array) -> Array:
            def add(own: FactoredGradient, total: Array) -> Array:
                return total + jnp.square(own.norm(size))

            return with_received(layer, add, total)

        own = jax.lax.fori_loop(0, layers, add_square, jnp.float32(0))
        factor = clip_factor(jnp.sqrt(of_all_parts(own)), clip_norm)

    def update_layer(layer: Array, carry: Any) -> Any:
        place = {"first_layer": layer, "first_expert": first_expert}

        def apply(own: FactoredGradient, carry: Any) -> Any:
            pool, state, counts = carry
            own = own.scaled(factor)
            pool, state, more = step_of_pool(pool, state, own, rule, step=step, **place)
            return pool, state, jax.tree.map(jnp.add, counts, more)

        return with_received(layer, apply, carry)

    zeros = Statistics(*[jnp.zeros(layers, jnp.float32)] * len(Statistics._fields))
    pool, state, counts = jax.lax.fori_loop(0, layers, update_layer, (pool, state, zeros))
    counts = jax.tree.map(of_all_parts, counts)
    return dataclasses.replace(pool, num_experts=whole.num_experts), state, counts


def _with_received(
    exchange: str | None,
    parts: int,
    gradient: FactoredGradient,
    num_experts: int,
    layer: Array,
    function: Callable[[FactoredGradient, Any], Any],
    carry: Any,
) -> Any:
    """Applies a function of the gradient of a device's experts in one layer, and of a carry.

    Tokens are in the order of the batch, so that sums over tokens are the same on every mesh.
    """
    own = jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), gradient
    )
    tokens, num_chosen = own.ids.shape
    columns = num_chosen
    if tokens * num_chosen * jax.lax.axis_size(AXES) >= MANY_PAIRS:
        columns = _columns_for(num_chosen, parts)

    def joined(of_tokens: FactoredGradient, axes: tuple[str, ...]) -> FactoredGradient:
        join = partial(jax.lax.all_gather, axis_name=axes, axis=0, tiled=True)
        return jax.tree.map(join, of_tokens)

    def apply(found: FactoredGradient, carry: Any) -> Any:
        return function(jax.tree.map(lambda leaf: leaf[None], found), carry)

    def apply_received(by: Gather | Dispatch) -> Any:
        received = jax.tree.map(by.send, own)._replace(ids=sent_ids(by, own.ids, num_experts))
        found = joined(received, (DATA, FSDP))
        return _few_columns(found, num_experts, columns, apply, carry)

    if parts == 1:
        return apply(joined(own, AXES), carry)
    return exchanged(dispatch_for(exchange, own.ids, num_experts), apply_received)


def _columns_for(num_chosen: int, parts: int) -> int:
    """Returns how many experts of a token one part of a pool is expected to have at most.

    This is four times the mean and 12 more, so that a token rarely has more.
    """
    return min(num_chosen, 4 * -(-num_chosen // parts) + 12)


def _few_columns(
    gradient: FactoredGradient,
    num_experts: int,
    columns: int,
    function: Callable[[FactoredGradient, Any], Any],
    carry: Any,
) -> Any:
    """Applies a function of a gradient without most of its "no expert"s, and of a carry.

    An update sorts all pairs, and most of those that a device receives are of others' experts. A
    pass applies the function to at most `columns` pairs of each token. One pass is enough unless
    some token has more. Every pass has all pairs of its experts, which are a range. (Only if a
    token chose one expert more than `columns` times, that expert is in several passes.)
    """
    ids, c_down, c_up, x, dy = gradient
    if columns == ids.shape[1]:
        return function(gradient, carry)

    def more_pairs(state: Any) -> Array:
        ids = state[0]
        return jnp.any(ids < num_experts)

    def one_pass(state: Any) -> Any:
        *pairs, carry = state
        # "No expert" is the largest number, so it comes last.
        pairs = jax.lax.sort(pairs, dimension=1, num_keys=1)
        ids, c_down, c_up = pairs
        few = ids[:, :columns]
        end = jnp.maximum(jnp.min(ids[:, columns]), jnp.min(ids[:, 0]) + 1)
        found = FactoredGradient(
            jnp.where(few < end, few, num_experts), c_down[:, :columns], c_up[:, :columns], x, dy
        )
        left = jnp.where(few < end, num_experts, few)
        ids = jnp.concatenate([left, ids[:, columns:]], axis=1)
        return ids, c_down, c_up, function(found, carry)

    return jax.lax.while_loop(more_pairs, one_pass, (ids, c_down, c_up, carry))[-1]


def dense_pool_gradient(
    gradient: FactoredGradient, num_experts: int
) -> Float[Array, "layers N 2 D"]:
    """Returns the dense gradient of a stack of pools, summed over the tokens of all devices."""

    def local(gradient: FactoredGradient) -> Array:
        return jax.lax.psum(gradient.dense(num_experts), AXES)

    if jax.sharding.get_abstract_mesh().empty:
        return gradient.dense(num_experts)
    return over_mesh(local, (P(None, AXES),), P())(gradient)


def gather_tokens(gradient: FactoredGradient) -> FactoredGradient:
    """Replicates the gradient of a stack of pools. Every device gets all tokens in order."""
    if jax.sharding.get_abstract_mesh().empty:
        return gradient
    return jax.lax.with_sharding_constraint(gradient, P())
