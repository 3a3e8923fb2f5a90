"""How the devices of an `expert` group exchange tokens, inside `jax.shard_map`.

A device has the experts of one part of a pool, and tokens that use experts of any part. An exchange
sends tokens to the devices that have their experts, and sends sums of results back. There are two:

- `Gather`: every device receives the tokens of all devices. A token is sent to E devices, whatever
  experts it uses.
- `Dispatch`: a device receives only tokens that use its experts, at most `capacity` of them from
  each device. A token is sent to at most min(K, E) devices.

Both give the same results. If more tokens than the capacity use the experts of one device, all
devices gather instead, so no token is ever dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from peerjax.sharding.rules import AXES, EXPERT

GATHER, DISPATCH = "gather", "dispatch"
EXCHANGES = (GATHER, DISPATCH)
# A capacity is this many times the number of tokens that a device would have for another one if
# all experts were used alike.
SLACK = 1.5
# Inputs of experts that a device receives at a time.
BYTES_AT_A_TIME = 1 << 28


def capacity_for(tokens: int, num_chosen: int, group: int) -> int:
    """Returns how many of its tokens a device can dispatch to each device of its group.

    If every expert is as likely as any other, a token uses experts of a device with probability
    `p = 1 - (1 - 1/E)^K`. The capacity is 1.5 times the mean, and 4 standard deviations.

    Args:
        tokens: tokens of a device.
        num_chosen: K, experts of a token.
        group: E, devices of the group.
    """
    used = 1 - (1 - 1 / group) ** num_chosen
    likely = SLACK * tokens * used + 4 * math.sqrt(tokens * used * (1 - used))
    return min(tokens, 8 * math.ceil(likely / 8))


def cheaper_exchange(tokens: int, num_chosen: int, group: int) -> str:
    """Returns the exchange that sends fewer bytes: "gather" or "dispatch".

    A device receives E * T tokens by gathering, and E times the capacity by dispatching. The latter
    must be at most half as many, because dispatching also sorts tokens by device.

    Args:
        tokens: T, tokens of a device.
        num_chosen: K, experts of a token.
        group: E, devices of the group.
    """
    return DISPATCH if 2 * capacity_for(tokens, num_chosen, group) <= tokens else GATHER


class Gather:
    """Sends every token to all devices of the group."""

    def send(self, of_tokens: Array, fill: int = 0) -> Array:
        """Maps `[T, ...]` of a device's tokens to `[E * T, ...]` of the tokens of its group."""
        del fill  # all places are used
        return jax.lax.all_gather(of_tokens, EXPERT, axis=0, tiled=True)

    def send_back(self, of_rows: Array) -> Array:
        """Maps `[E * T, ...]` to sums over the group for a device's own tokens, `[T, ...]`."""
        return jax.lax.psum_scatter(of_rows, EXPERT, scatter_dimension=0, tiled=True)


class Dispatch:
    """Sends a token to the devices of the group that have experts of it.

    Args:
        ids: expert numbers in the whole pool.
        num_experts: experts of a device. Larger ids than those of the group are not sent.
        capacity: tokens that a device can send to each device.

    Attributes:
        fits: whether, on the whole mesh, no device has more tokens for another one.
    """

    def __init__(self, ids: Int[Array, "T K"], num_experts: int, capacity: int):
        self._tokens, group = ids.shape[0], jax.lax.axis_size(EXPERT)
        token = jnp.arange(self._tokens, dtype=jnp.int32)[:, None]
        uses_TE = jnp.zeros((self._tokens, group), bool)
        uses_TE = uses_TE.at[token, ids // num_experts].set(True, mode="drop")
        place_TE = jnp.cumsum(uses_TE, axis=0, dtype=jnp.int32) - 1
        fits_here = jnp.all(place_TE[-1] < capacity)
        self.fits: Bool[Array, ""] = jax.lax.psum((~fits_here).astype(jnp.int32), AXES) == 0
        slots = group * capacity
        slot_TE = jnp.arange(group, dtype=jnp.int32) * capacity + place_TE
        slot_TE = jnp.where(uses_TE & (place_TE < capacity), slot_TE, slots)
        empty = jnp.full(slots, self._tokens, jnp.int32)
        self._token_of_slot = empty.at[slot_TE].set(token, mode="drop")

    def send(self, of_tokens: Array, fill: int = 0) -> Array:
        """Maps `[T, ...]` of a device's tokens to `[E * capacity, ...]` of received ones.

        The tokens of a device stay in order. Unused places have the value `fill`.
        """
        rows = of_tokens.at[self._token_of_slot].get(mode="fill", fill_value=fill)
        return jax.lax.all_to_all(rows, EXPERT, 0, 0, tiled=True)

    def send_back(self, of_rows: Array) -> Array:
        """Maps `[E * capacity, ...]` to sums over the group for a device's own tokens."""
        rows = jax.lax.all_to_all(of_rows, EXPERT, 0, 0, tiled=True)
        zeros = jnp.zeros((self._tokens, *rows.shape[1:]), jnp.float32)
        sums = zeros.at[self._token_of_slot].add(rows.astype(jnp.float32), mode="drop")
        return sums.astype(rows.dtype)


def chosen(exchange: str | None, tokens: int, num_chosen: int, group: int) -> str:
    """Returns the exchange of T tokens of a device, "gather" or "dispatch".

    Args:
        exchange: the exchange that the caller chose, or `None` for the cheaper one.
        tokens: T.
        num_chosen: K, experts of a token.
        group: E, devices of the group.
    """
    return exchange or cheaper_exchange(tokens, num_chosen, group)


def dispatch_for(exchange: str | None, ids: Int[Array, "T K"], num_experts: int) -> Dispatch | None:
    """Returns the dispatch of a device's tokens, or `None` if the device gathers.

    Args:
        exchange: as in `chosen`.
        ids: expert numbers in the whole pool.
        num_experts: experts of a device.
    """
    sizes = (*ids.shape, jax.lax.axis_size(EXPERT))
    if chosen(exchange, *sizes) == GATHER:
        return None
    return Dispatch(ids, num_experts, capacity_for(*sizes))


def exchanged(dispatch: Dispatch | None, function: Callable[[Gather | Dispatch], Any]) -> Any:
    """Applies a function with a dispatch if there is one and it fits, else with a gather.

    Args:
        dispatch: result of `dispatch_for`.
        function: function of an exchange, with results of the same shapes for both.
    """
    if dispatch is None:
        return function(Gather())
    return jax.lax.cond(dispatch.fits, lambda: function(dispatch), lambda: function(Gather()))


def in_chunks(function: Callable[..., Any], tokens: int, *of_tokens: Array) -> Any:
    """Applies a function to a few tokens at a time, one chunk after the other.

    Args:
        function: function of arrays `[C, ...]` that returns a tree of arrays `[C, ...]`.
        tokens: C, which divides their number.
        *of_tokens: arrays `[T, ...]`.
    """
    total = of_tokens[0].shape[0]
    if tokens == total:
        return function(*of_tokens)
    chunks = [each.reshape(-1, tokens, *each.shape[1:]) for each in of_tokens]
    found = jax.lax.map(lambda chunk: function(*chunk), chunks)
    return jax.tree.map(lambda each: each.reshape(total, *each.shape[2:]), found)


def tokens_at_a_time(tokens: int, bytes_of_token: int, group: int) -> int:
    """Returns how many of its tokens a device exchanges at a time, a divisor of their number.

    Args:
        tokens: T, tokens of a device.
        bytes_of_token: bytes of an expert's input.
        group: E, devices of the group.
    """
    most = max(1, BYTES_AT_A_TIME // (group * bytes_of_token))
    return next(size for size in range(min(most, tokens), 0, -1) if tokens % size == 0)
