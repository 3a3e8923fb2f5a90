"""The integer stage: codes and accumulators as one wide integer that takes stochastic steps.

With accumulators of b bits, a weight's code w and accumulator a are the two digits of
`v = 2^b w + a`, where a is in [-2^(b-1), 2^(b-1)). The optimizer moves the value v / 2^b, in steps
of the code.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.codes import Code

# Larger steps, in units of v, clip in any state. The limit keeps float32 to int32 exact.
LARGEST_STEP = float(1 << 20)
RUNG = 2.0**0.25  # scales move by this factor
HELD = 0.5  # share of a vector's sum of squares at which few large values determine its scale


def spread(code: Code, bits: int = 0) -> float:
    """Returns the target RMS of codes, or of values with accumulators of `bits` bits."""
    return code.spread * code.top * 2.0**bits


def nearest(
    weights: Float[Array, "*R D"], code: Code, scales: Float[Array, "*R"] | None = None
) -> tuple[Int[Array, "*R D"], Float[Array, "*R"]]:
    """Returns weights as codes, rounded to nearest, and the scale of each vector.

    Weights beyond the range of codes are clipped.

    Args:
        weights: the vectors.
        code: their format.
        scales: scales of the vectors; by default, `target_scales`.
    """
    if scales is None:
        scales = target_scales(weights, code)
    codes = jnp.clip(jnp.round(weights / scales[..., None]), -code.top, code.top)
    return codes.astype(jnp.int32), scales


def target_scales(weights: Float[Array, "*R D"], code: Code) -> Float[Array, "*R"]:
    """Returns the scales that training aims at.

    They are some rungs higher if clipped weights would hold most of a vector's sum of squares.
    """
    top = code.top
    squares = jnp.square(weights.astype(jnp.float32))

    def too_low(scales: Float[Array, "*R"]) -> Bool[Array, "*R"]:
        beyond = squares > jnp.square((top + 0.5) * scales)[..., None]
        held = jnp.sum(jnp.where(beyond, squares, 0.0), axis=-1)
        return held > HELD * jnp.sum(squares, axis=-1)

    size = jnp.sqrt(jnp.mean(squares, axis=-1))
    # A vector of zeros needs a scale too, with which a step can move it.
    scales = jnp.where(size == 0, 1.0, size) / spread(code)

    def climb(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        scales, low = carry
        scales = jnp.where(low, RUNG * scales, scales)
        return scales, too_low(scales)

    scales, _ = jax.lax.while_loop(
        lambda carry: jnp.any(carry[1]), climb, (scales, too_low(scales))
    )
    return scales


def join(codes: Int[Array, "*S"], accumulators: Int[Array, "*S"], bits: int) -> Int[Array, "*S"]:
    """Returns v = 2^bits * code + accumulator."""
    return (codes << bits) + accumulators


def split(values: Int[Array, "*S"], bits: int) -> tuple[Int[Array, "*S"], Int[Array, "*S"]]:
    """Returns the code and accumulator of v. The code is v / 2^bits, to nearest with ties up."""
    codes = (values + ((1 << bits) >> 1)) >> bits
    return codes, values - (codes << bits)


def limits(code: Code, bits: int) -> tuple[int, int]:
    """Returns the smallest and largest v, of extreme codes with their extreme accumulators."""
    top = code.top << bits
    half = (1 << bits) >> 1
    return -top - half, top + max(half - 1, 0)


def clips(values: Int[Array, "*S"], code: Code, bits: int) -> Bool[Array, "*S"]:
    """Returns which values lie outside the limits."""
    low, high = limits(code, bits)
    return (values < low) | (values > high)


def bounded(step: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Clips a step so that it is exact as an integer once it is rounded."""
    return jnp.clip(step, -LARGEST_STEP, LARGEST_STEP)
