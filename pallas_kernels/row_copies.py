"""Many small copies between HBM and VMEM on a TPU."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

UNROLL = 8  # copies started together, so that their scalar instructions share cycles


def for_each(count: int, act: Callable[[Any], None]) -> None:
    """Calls `act` with 0, 1, ..., count - 1, eight calls per pass of a loop.

    Args:
        count: number of calls, a multiple of 8.
        act: function to call.
    """

    def body(index, carry):
        for each in range(UNROLL):
            act(index * UNROLL + each)
        return carry

    jax.lax.fori_loop(0, count // UNROLL, body, 0)


def wait_for(count: Any, capacity: int, one: Any, all_of_them: Any, arrived: Any) -> None:
    """Waits until `count` copies of the same size have been made.

    The semaphore counts the data that arrives, so one wait is enough for a full buffer. Otherwise
    there is one wait per copy, and it does not matter which copies are missing.

    Args:
        count: number of copies that have been started.
        capacity: largest possible number of copies.
        one: reference to as much memory as one copy fills.
        all_of_them: reference to as much memory as `capacity` copies fill.
        arrived: semaphore of all these copies.
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
