"""Lookups in pools over a mesh.

Under `jax.set_mesh` a lookup runs inside `jax.shard_map`. Without a mesh it is the plain operation,
so that a layer can be used on its own. Tokens are split over all axes of the mesh, and a pool over
`expert` if `shards_of_pool` says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels.expert_lookup import lookup
from pallas_kernels.factored_gradient import Tap
from pallas_kernels.storage import ExpertPool
from peerjax.sharding.exchange import (
    DISPATCH,
    GATHER,
    Dispatch,
    Gather,
    chosen,
    dispatch_for,
    exchanged,
    in_chunks,
    tokens_at_a_time,
)
from peerjax.sharding.over_mesh import over_mesh
from peerjax.sharding.rules import AXES, BATCH, EXPERT, pool_specs, shards_of_pool


class _Static(NamedTuple):
    """Arguments that are known before tracing."""

    look_up: Callable[..., Array]
    exchange: str | None


def sharded_lookup(
    pool: ExpertPool,
    ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    x: Float[Array, "T D"],
    *,
    hidden_bias: Float[Array, "T K"] | None = None,
    tap: Tap | None = None,
    exchange: str | None = None,
    **options: Any,
) -> Float[Array, "T D"]:
    """Runs `pallas_kernels.expert_lookup.lookup` over the mesh.

    If the pool is split, devices of one `expert` group exchange their tokens, some at a time. Each
    looks up its own experts, and sums of its outputs go back to the tokens' devices.

    Args:
        pool: as in `lookup`.
        ids: as in `lookup`.
        gates: as in `lookup`.
        x: as in `lookup`.
        hidden_bias: as in `lookup`.
        tap: as in `lookup`.
        exchange: "gather", "dispatch", or `None` for the cheaper one; see
            `peerjax.sharding.exchange`.
        **options: `activation` and `implementation` of `lookup`.

    Raises:
        ValueError: in the same cases as `lookup`.
    """
    if tap is None:
        tap = Tap.zeros_for(ids, x)
    if hidden_bias is None:
        hidden_bias = jnp.zeros(ids.shape, jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    look_up = partial(lookup, **options)
    is_split = not mesh.empty and shards_of_pool(pool.num_experts, mesh) > 1
    static = _Static(look_up, exchange)

    def local(pool, ids, gates, x, hidden_bias, tap):
        if is_split:
            return _elsewhere(static, local_part(pool), ids, gates, x, hidden_bias, tap)
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


def sent_ids(exchange: Gather | Dispatch, ids: Int[Array, "T K"], num_experts: int) -> Array:
    """Returns the expert numbers of received tokens, in this device's part of a pool."""
    beyond = jax.lax.axis_size(EXPERT) * num_experts
    return local_ids(exchange.send(ids, fill=beyond), num_experts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _elsewhere(
    static: _Static, pool: ExpertPool, ids: Array, gates: Array, x: Array, bias: Array, tap: Tap
) -> Array:
    """Looks up the experts of a device's tokens, on the devices that have these experts."""

    def of_chunk(ids: Array, gates: Array, x: Array, bias: Array) -> Array:
        def by(exchange: Gather | Dispatch) -> Array:
            own = sent_ids(exchange, ids, pool.num_experts)
            y = static.look_up(
                pool,
                own,
                exchange.send(gates),
                exchange.send(x),
                hidden_bias=exchange.send(bias),
            )
            return exchange.send_back(y)

        return exchanged(dispatch_for(static.exchange, ids, pool.num_experts), by)

    return in_chunks(of_chunk, _tokens_at_a_time(x), ids, gates, x, bias)


def _elsewhere_forward(static, pool, ids, gates, x, bias, tap):
    return _elsewhere(static, pool, ids, gates, x, bias, tap), (pool, ids, gates, x, bias)


def _elsewhere_backward(static, kept, dy):
    pool, *of_tokens = kept

    def of_chunk(ids, gates, x, bias, dy):
        def by(exchange: Gather | Dispatch) -> tuple[Array, ...]:
            own = sent_ids(exchange, ids, pool.num_experts)
            inputs = [exchange.send(each) for each in (gates, x, bias)]

            def forward(gates: Array, x: Array, bias: Array, tap: Tap) -> Array:
                return static.look_up(pool, own, gates, x, hidden_bias=bias, tap=tap)

            _, backward = jax.vjp(forward, *inputs, Tap.zeros_for(own, inputs[1]))
            *of_inputs, tap = backward(exchange.send(dy))
            # Every pair has its coefficients on one device, the one with its expert.
            found = (*of_inputs, tap.c_down, tap.c_up)
            return tuple(exchange.send_back(each) for each in found)

        return exchanged(dispatch_for(static.exchange, ids, pool.num_experts), by)

    x = of_tokens[2]
    *of_inputs, c_down, c_up = in_chunks(of_chunk, _tokens_at_a_time(x), *of_tokens, dy)
    of_pool = jax.tree.map(lambda leaf: None, pool)
    return of_pool, None, *of_inputs, Tap(c_down, c_up, x, dy)


_elsewhere.defvjp(_elsewhere_forward, _elsewhere_backward)


def _tokens_at_a_time(x: Array) -> int:
    tokens, width = x.shape
    return tokens_at_a_time(tokens, width * x.dtype.itemsize, jax.lax.axis_size(EXPERT))


def overflows(
    ids: Int[Array, "layers T K"],
    x: Float[Array, "layers T D"],
    num_experts: int,
    exchange: str | None = None,
) -> Float[Array, ""] | None:
    """Returns the share of chunks of tokens that lookups gather because a capacity is too small.

    Args:
        ids: expert numbers of lookups.
        x: their inputs.
        num_experts: experts of the pool.
        exchange: as in `sharded_lookup`.

    Returns:
        The share, or `None` if lookups do not dispatch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else shards_of_pool(num_experts, mesh)
    if parts == 1:
        return None
    tokens, bytes_of_token = x.shape[1] // mesh.size, x.shape[2] * x.dtype.itemsize
    size = tokens_at_a_time(tokens, bytes_of_token, parts)
    if chosen(exchange, size, ids.shape[2], parts) == GATHER:
        return None

    def of_chunk(ids: Array) -> Array:
        dispatch = dispatch_for(DISPATCH, ids, num_experts // parts)
        assert dispatch is not None
        return jnp.full(size, ~dispatch.fits, jnp.float32)

    def local(ids: Array) -> Array:
        return jnp.mean(jax.lax.map(lambda each: in_chunks(of_chunk, size, each), ids))

    return over_mesh(local, P(None, AXES), P())(ids)
