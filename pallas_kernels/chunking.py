"""Chunk sizes of the loops in the XLA implementations.

On a CPU, small chunks stay in the caches and are fast. An accelerator runs the passes of a loop one
after the other, so a few large passes are faster.
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


PAIRS_OF_TOKENS = ChunkSize(512, 16_384)  # (expert, token) pairs whose experts one pass reads
HIT_EXPERTS = ChunkSize(256, 2048)  # experts that one pass rewrites


def with_chunk_size(function: Callable[..., Any], size: ChunkSize, *operands: Any) -> Any:
    """Calls `function(*operands, chunk=...)` with the size for the platform."""
    return by_platform(
        *operands,
        cpu=partial(function, chunk=size.cpu),
        default=partial(function, chunk=size.accelerator),
    )


def map_tokens(function: Callable[[Any], Any], tokens: tuple[Array, ...], num_chosen: int) -> Any:
    """Maps a function of one token, which reads `num_chosen` experts, over all tokens."""

    def walk(*tokens: Array, chunk: int) -> Any:
        return jax.lax.map(function, tokens, batch_size=max(1, chunk // num_chosen))

    return with_chunk_size(walk, PAIRS_OF_TOKENS, *tokens)
