"""Updates of pools over a mesh; see `peerjax.sharding.lookups`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from pallas_kernels.expert_update import Hyperparameters, Statistics, UpdateState, update
from pallas_kernels.factored_gradient import FactoredGradient, clip_factor
from pallas_kernels.storage import ExpertPool
from peerjax.sharding.exchange import Dispatch, Gather, dispatch_for
from peerjax.sharding.lookups import sent_ids
from peerjax.sharding.over_mesh import over_mesh
from peerjax.sharding.rules import AXES, DATA, EXPERT, FSDP, pool_specs, shards_of_pool, state_specs

# Pairs of all tokens from which a device leaves out others' pairs before it sorts its own.
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
    if mesh.size <= 1 or tuple(mesh.axis_names) != AXES or not pool.is_stack:

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

    Tokens are in the order of the batch, so that sums over tokens are the same on every mesh. If
    there are very many pairs, those of other devices are left out before the pairs are sorted.
    """
    own = jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), gradient
    )
    tokens, num_chosen = own.ids.shape

    def joined(of_tokens: FactoredGradient, axes: tuple[str, ...]) -> FactoredGradient:
        join = partial(jax.lax.all_gather, axis_name=axes, axis=0, tiled=True)
        return jax.tree.map(join, of_tokens)

    def received(by: Gather | Dispatch) -> FactoredGradient:
        ids = sent_ids(by, own.ids, num_experts)
        return joined(FactoredGradient(ids, *map(by.send, own[1:])), (DATA, FSDP))

    def apply(found: FactoredGradient, carry: Any) -> Any:
        return function(jax.tree.map(lambda leaf: leaf[None], found), carry)

    if parts == 1:
        return apply(joined(own, AXES), carry)
    columns = _columns_for(num_chosen, parts)
    if tokens * num_chosen * jax.lax.axis_size(AXES) < MANY_PAIRS:
        columns = num_chosen
    dispatch = dispatch_for(exchange, own.ids, num_experts)
    if dispatch is None and columns == num_chosen:
        return apply(received(Gather()), carry)

    def apply_few(_: Array, carry: Any) -> Any:
        return apply(_narrowed(received(dispatch or Gather()), columns), carry)

    def apply_all(_: Array, carry: Any) -> Any:
        return apply(received(Gather()), carry)

    fits = _fit_columns(own.ids, num_experts, columns, parts)
    if dispatch is not None:
        fits &= dispatch.fits
    # A loop of one or no iteration rewrites its carry in place. A conditional might copy it.
    carry = jax.lax.fori_loop(0, fits.astype(jnp.int32), apply_few, carry)
    return jax.lax.fori_loop(0, (~fits).astype(jnp.int32), apply_all, carry)


def _columns_for(num_chosen: int, parts: int) -> int:
    """Returns how many experts of a token one part of a pool is expected to have at most.

    This is four times the mean and 12 more, so that a step in which some token has more is rare.
    """
    return min(num_chosen, 4 * -(-num_chosen // parts) + 12)


def _fit_columns(ids: Array, num_experts: int, columns: int, parts: int) -> Bool[Array, ""]:
    """Returns whether, on the whole mesh, no token has more experts of one part of a pool."""
    token = jnp.arange(ids.shape[0])[:, None]
    counts_TE = jnp.zeros((ids.shape[0], parts), jnp.int32)
    counts_TE = counts_TE.at[token, ids // num_experts].add(1, mode="drop")
    return jax.lax.pmax(jnp.max(counts_TE), AXES) <= columns


def _narrowed(gradient: FactoredGradient, columns: int) -> FactoredGradient:
    """Returns the gradient with only the first `columns` experts of each token that exist."""
    ids, c_down, c_up, x, dy = gradient
    if columns == ids.shape[1]:
        return gradient
    # "No expert" is the largest number, so it comes last.
    pairs = jax.lax.sort((ids, c_down, c_up), dimension=1, num_keys=1)
    ids, c_down, c_up = (each[:, :columns] for each in pairs)
    return FactoredGradient(ids, c_down, c_up, x, dy)


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
