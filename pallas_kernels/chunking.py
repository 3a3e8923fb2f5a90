"""How much of a loop's work the XLA implementations take on at a time.

A CPU wants what it handles at a time to stay in its caches, and is fast with little. An accelerator
runs the passes of a loop one after the other, and wants few large ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from pallas_kernels.platforms import by_platform


class ChunkSize(NamedTuple):
    """A size for CPUs and one for accelerators."""

    cpu: int
    accelerator: int


PAIRS_OF_TOKENS = ChunkSize(512, 16_384)  # (expert, token) pairs whose experts are read at a time
HIT_EXPERTS = ChunkSize(256, 2048)  # experts rewritten at a time


def with_chunk_size(function: Callable[..., Any], size: ChunkSize, *operands: Any) -> Any:
    """Calls `function(*operands, chunk=...)` with the size of the platform."""
    return by_platform(
        *operands,
        cpu=partial(function, chunk=size.cpu),
        default=partial(function, chunk=size.accelerator),
    )


def map_tokens(function: Callable[[Any], Any], tokens: tuple[Array, ...], num_chosen: int) -> Any:
    """Maps a function of one token, which reads `num_chosen` experts, over all."""

    def walk(*tokens: Array, chunk: int) -> Any:
        return jax.lax.map(function, tokens, batch_size=max(1, chunk // num_chosen))

    return with_chunk_size(walk, PAIRS_OF_TOKENS, *tokens)
