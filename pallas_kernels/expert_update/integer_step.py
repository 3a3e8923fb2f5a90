"""The integer stage: codes and accumulators as one wide integer that takes stochastic steps.

With accumulators of b bits, a weight's code w and accumulator a are the two digits of
`v = 2^b w + a`, a in [-2^(b-1), 2^(b-1)); the value that the optimizer moves is v / 2^b code steps.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Beyond this many units a step clips whatever the state; it keeps float32 to int32 exact.
LARGEST_STEP = float(1 << 20)
# The RMS of a row's codes that its scale aims at, as a share of the largest code. Rounding and
# clipping of normal weights to int4 codes together cost least near it.
SPREAD = 0.37


def largest_code(code_bits: int) -> int:
    """Codes lie in [-largest, largest]; the most negative code is not used."""
    return (1 << (code_bits - 1)) - 1


def spread(code_bits: int, bits: int = 0) -> float:
    """The RMS that a scale aims at: of codes, or of values with accumulators of some bits."""
    return SPREAD * largest_code(code_bits) * 2.0**bits


def join(codes: Int[Array, "*S"], accumulators: Int[Array, "*S"], bits: int) -> Int[Array, "*S"]:
    """V = 2^bits * code + accumulator."""
    return (codes << bits) + accumulators


def split(values: Int[Array, "*S"], bits: int) -> tuple[Int[Array, "*S"], Int[Array, "*S"]]:
    """The code and accumulator of v: the code is v / 2^bits rounded to nearest, ties up."""
    codes = (values + ((1 << bits) >> 1)) >> bits
    return codes, values - (codes << bits)


def limits(code_bits: int, bits: int) -> tuple[int, int]:
    """The smallest and largest v: those of the extreme codes with their extreme accumulators."""
    top = largest_code(code_bits) << bits
    half = (1 << bits) >> 1
    return -top - half, top + max(half - 1, 0)


def clips(values: Int[Array, "*S"], code_bits: int, bits: int) -> Bool[Array, "*S"]:
    """Which values lie outside the limits."""
    low, high = limits(code_bits, bits)
    return (values < low) | (values > high)


def bounded(step: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """A step that is exact as an integer once it is rounded."""
    return jnp.clip(step, -LARGEST_STEP, LARGEST_STEP)
