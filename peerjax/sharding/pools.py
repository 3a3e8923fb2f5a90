"""Operations on pools over a mesh.

Under `jax.set_mesh` these run inside `jax.shard_map`. Without a mesh they are the plain operations,
so that a layer can be used on its own. Tokens are split over all axes of the mesh, and a pool over
`expert` if `shards_of_pool` says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels.expert_lookup import lookup
from pallas_kernels.expert_update import Hyperparameters, Statistics, UpdateState, update
from pallas_kernels.factored_gradient import FactoredGradient, Tap, clip_factor
from pallas_kernels.storage import ExpertPool
from peerjax.sharding.over_mesh import over_mesh
from peerjax.sharding.rules import AXES, BATCH, EXPERT, pool_specs, shards_of_pool, state_specs

LookUp = Callable[..., Array]


def sharded_lookup(
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    x: Float[Array, "T D"],
    *,
    activation: str,
    hidden_bias: Float[Array, "T K"] | None = None,
    tap: Tap | None = None,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Runs `pallas_kernels.expert_lookup.lookup` over the mesh.

    If the pool is split, devices of one `expert` group exchange their tokens. Each looks up its own
    experts for the tokens of all of them, and sums of its outputs go back to the tokens' devices.
    """
    if tap is None:
        tap = Tap.zeros_for(ids, x)
    if hidden_bias is None:
        hidden_bias = jnp.zeros(ids.shape, jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    look_up = partial(lookup, activation=activation, implementation=implementation)
    is_split = not mesh.empty and shards_of_pool(pool.num_experts, mesh) > 1

    def local(pool, ids, gates, x, hidden_bias, tap):
        if is_split:
            return _by_gather(look_up, local_part(pool), ids, gates, x, hidden_bias, tap)
        return look_up(pool, ids, gates, x, hidden_bias=hidden_bias, tap=tap)

    specs = (P() if mesh.empty else pool_specs(pool, mesh), *[BATCH] * 5)
    return over_mesh(local, specs, BATCH)(pool, ids, gates, x, hidden_bias, tap)


def local_part(pool: ExpertPool) -> ExpertPool:
    """Returns the pool of this device's experts, inside `jax.shard_map`."""
    return dataclasses.replace(pool, num_experts=pool.num_experts // jax.lax.axis_size(EXPERT))


def local_ids(ids: Int[Array, "*S"], num_experts: int) -> Int[Array, "*S"]:
    """Returns expert numbers in this device's part of a pool.

    Args:
        ids: numbers in the whole pool.
        num_experts: number of experts of each part, which stands for all others in the result.
    """
    own = ids - jax.lax.axis_index(EXPERT) * num_experts
    return jnp.where((own >= 0) & (own < num_experts), own, num_experts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_gather(
    look_up: LookUp, pool: ExpertPool, ids: Array, gates: Array, x: Array, bias: Array, tap: Tap
) -> Array:
    ids, gates, x, bias = map(_gathered, (ids, gates, x, bias))
    y = look_up(pool, local_ids(ids, pool.num_experts), gates, x, hidden_bias=bias)
    return _scattered(y)


def _by_gather_forward(look_up, pool, ids, gates, x, bias, tap):
    return _by_gather(look_up, pool, ids, gates, x, bias, tap), (pool, ids, gates, x, bias)


def _by_gather_backward(look_up, kept, dy):
    pool, *own = kept
    ids, gates, x, bias = map(_gathered, own)
    ids = local_ids(ids, pool.num_experts)

    def forward(gates: Array, x: Array, bias: Array, tap: Tap) -> Array:
        return look_up(pool, ids, gates, x, hidden_bias=bias, tap=tap)

    _, backward = jax.vjp(forward, gates, x, bias, Tap.zeros_for(ids, x))
    d_gates, d_x, d_bias, tap = backward(_gathered(dy))
    # Every pair has its coefficients on one device, the one with its expert.
    c_down, c_up = map(_scattered, (tap.c_down, tap.c_up))
    of_pool = jax.tree.map(lambda leaf: None, pool)
    own_tap = Tap(c_down, c_up, own[2], dy)
    return of_pool, None, _scattered(d_gates), _scattered(d_x), _scattered(d_bias), own_tap


_by_gather.defvjp(_by_gather_forward, _by_gather_backward)


def _gathered(of_tokens: Array) -> Array:
    """Returns the tokens of all devices of the `expert` group."""
    return jax.lax.all_gather(of_tokens, EXPERT, axis=0, tiled=True)


def _scattered(of_tokens: Array) -> Array:
    """Returns sums over the `expert` group for this device's own tokens."""
    return jax.lax.psum_scatter(of_tokens, EXPERT, scatter_dimension=0, tiled=True)


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
) -> tuple[ExpertPool, UpdateState, Statistics]:
    """Runs `pallas_kernels.expert_update.update` of a stack of pools over the mesh.

    Each device gathers the gradient of all tokens, one layer at a time, and rewrites the experts
    that it has. Devices with the same experts have the same gradient, and draw the same random
    bits. These depend on numbers in the whole pool, so they are the same on every mesh.

    Args:
        pool: a stack of pools, or one pool. One pool is not split.
        state: its state.
        gradient: its gradient.
        hyperparameters: numbers of the rule.
        seed: as in `update`.
        step: as in `update`.
        clip_norm: bound on the norm of the gradient of the whole stack; `None` for no bound.
        accumulator_bits: as in `update`.
        implementation: as in `update`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    step_of_pool = partial(
        update, seed=seed, accumulator_bits=accumulator_bits, implementation=implementation
    )
    if mesh.empty or shards_of_pool(pool.num_experts, mesh) == 1 or not pool.is_stack:

        def whole(step, pool, state, gradient, rule):
            if clip_norm is not None:
                gradient = gradient.clip(clip_norm, pool.num_experts)
            return step_of_pool(pool, state, gradient, rule, step=step)

        everywhere = gather_tokens(gradient)
        return over_mesh(whole, P(), P())(step, pool, state, everywhere, hyperparameters)

    part = partial(_update_part, step_of_pool, clip_norm)
    of_pool, of_state = pool_specs(pool, mesh), state_specs(state, mesh)
    specs = (P(), of_pool, of_state, P(None, AXES), P())
    mapped = over_mesh(part, specs, (of_pool, of_state, P()))
    return mapped(step, pool, state, gradient, hyperparameters)


def _update_part(
    step_of_pool: Callable[..., Any],
    clip_norm: Any,
    step: Any,
    whole: ExpertPool,
    state: UpdateState,
    gradient: FactoredGradient,
    rule: Hyperparameters,
) -> tuple[ExpertPool, UpdateState, Statistics]:
    """Updates this device's experts, inside `jax.shard_map`, one layer after the other."""
    pool, layers = local_part(whole), gradient.ids.shape[0]
    size = pool.num_experts
    factor = jnp.float32(1)
    if clip_norm is not None:

        def add_square(layer: Array, total: Array) -> Array:
            return total + jnp.square(_of_layer(gradient, layer, size).norm(size))

        own = jax.lax.fori_loop(0, layers, add_square, jnp.float32(0))
        factor = clip_factor(jnp.sqrt(jax.lax.psum(own, EXPERT)), clip_norm)

    def update_layer(layer: Array, carry: Any) -> Any:
        pool, state, counts = carry
        own = _of_layer(gradient, layer, size).scaled(factor)
        place = {"first_layer": layer, "first_expert": jax.lax.axis_index(EXPERT) * size}
        pool, state, more = step_of_pool(pool, state, own, rule, step=step, **place)
        return pool, state, jax.tree.map(jnp.add, counts, more)

    zeros = Statistics(*[jnp.zeros(layers, jnp.float32)] * len(Statistics._fields))
    pool, state, counts = jax.lax.fori_loop(0, layers, update_layer, (pool, state, zeros))
    counts = jax.tree.map(lambda leaf: jax.lax.psum(leaf, EXPERT), counts)
    return dataclasses.replace(pool, num_experts=whole.num_experts), state, counts


def _of_layer(gradient: FactoredGradient, layer: Array, num_experts: int) -> FactoredGradient:
    """Gathers the gradient of one layer from all devices, with this device's expert numbers."""

    def every_token(leaf: Array) -> Array:
        own = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=True)
        return jax.lax.all_gather(own, AXES, axis=1, tiled=True)

    found = jax.tree.map(every_token, gradient)
    return found._replace(ids=local_ids(found.ids, num_experts))


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
