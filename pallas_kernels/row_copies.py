"""Many small copies between HBM and VMEM on a TPU."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

UNROLL = 8  # copies started at a time: the scalar instructions of several share their cycles


def for_each(count: int, act: Callable[[Any], None]) -> None:
    """Calls `act` with 0, 1, ..., count - 1, a multiple of 8, several in one pass of a loop."""

    def body(index, carry):
        for each in range(UNROLL):
            act(index * UNROLL + each)
        return carry

    jax.lax.fori_loop(0, count // UNROLL, body, 0)


def wait_for(count: Any, capacity: int, one: Any, all_of_them: Any, arrived: Any) -> None:
    """Waits until as many copies of the same size as `count` have been made.

    A semaphore counts what arrives. So a full buffer is waited for at once, and otherwise it does
    not matter which copies are missing.

    Args:
        count: how many copies have been started.
        capacity: how many there can be.
        one: reference to as much memory as one copy fills.
        all_of_them: reference to as much as all fill.
        arrived: the semaphore of all these copies.
    """

    @pl.when(count == capacity)
    def _():
        pltpu.make_async_copy(all_of_them, all_of_them, arrived).wait()

    @pl.when(count < capacity)
    def _():
        def body(_, carry):
            pltpu.make_async_copy(one, one, arrived).wait()
            return carry

        jax.lax.fori_loop(0, count, body, 0)
