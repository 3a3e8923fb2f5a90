"""Random bits from counters. They are the same on every backend, mesh and chunking.

`hash_words(seed, purpose, step, ...)` absorbs its arguments one at a time, each with a full mixing
round. Packing several counters into one word would overflow and correlate neighbours. The hash uses
plain 32-bit integer operations, and is ten times cheaper than threefry on a CPU.
"""

import enum

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

GOLDEN = 0x9E3779B9


class Purpose(enum.IntEnum):
    """Use of random bits. Hashes absorb it, so that no two uses share bits."""

    POOL_STEP = 1
    MATRIX_STEP = 2
    ECO = 3
    OPENED = 4


def _mix(state: UInt[Array, "*S"]) -> UInt[Array, "*S"]:
    """Applies a bijection of 32-bit words in which every input bit affects every output bit.

    The constants are those of Ellis's "lowbias32" (bias 0.17 of 2^-16 units).
    """
    state = (state ^ (state >> 16)) * jnp.uint32(0x7FEB352D)
    state = (state ^ (state >> 15)) * jnp.uint32(0x846CA68B)
    return state ^ (state >> 16)


def hash_words(*counters: Int[Array, "..."] | UInt[Array, "..."] | int) -> UInt[Array, "..."]:
    """Hashes counters, which broadcast against each other, to uniform 32-bit words.

    Only the lowest 32 bits of a Python integer are used.
    """
    return absorb(jnp.uint32(GOLDEN), *counters)


def absorb(
    state: UInt[Array, "..."], *counters: Int[Array, "..."] | UInt[Array, "..."] | int
) -> UInt[Array, "..."]:
    """Continues a hash: `absorb(hash_words(a, b), c)` is `hash_words(a, b, c)`."""
    for counter in counters:
        if isinstance(counter, int):
            counter = jnp.uint32(counter & 0xFFFFFFFF)
        state = _mix((state + jnp.uint32(GOLDEN)) ^ jnp.asarray(counter).astype(jnp.uint32))
    return state


def uniform(words: UInt[Array, "*S"]) -> Float[Array, "*S"]:
    """Turns random words into float32 numbers in [0, 1), multiples of 2^-24."""
    # Every backend converts int32 to floats, and 24 bits fit in it.
    return (words >> 8).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2**-24)


def round_stochastically(value: Float[Array, "*S"], words: UInt[Array, "*S"]) -> Float[Array, "*S"]:
    """Rounds to a neighbouring integer. The fractional part is the probability of rounding up.

    The result must fit in 32 bits, because int32 gives the only floor that every kernel has.
    """
    towards_zero = value.astype(jnp.int32).astype(value.dtype)
    floor = towards_zero - jnp.where(towards_zero > value, 1.0, 0.0).astype(value.dtype)
    return floor + jnp.where(uniform(words) < value - floor, 1.0, 0.0).astype(value.dtype)
