"""Times compiled programs in turns, so that a change of the machine's speed affects all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def medians_in_turns(
    programs: Mapping[str, Callable[[], Any]], repeats: int, timed: int = 9
) -> dict[str, float]:
    """Returns the median time of each program in seconds.

    Each turn begins with a call that is not timed, and has many that are. Otherwise the time of a
    program would depend on what the program before it left in the caches.

    Args:
        programs: functions that start programs and return arrays.
        repeats: number of turns.
        timed: number of timed calls of a program in a turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            jax.block_until_ready(program())
            for _ in range(timed):
                start = time.perf_counter()
                jax.block_until_ready(program())
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
