"""Formats of packed weights: the number of levels of a code, and the bits that store it."""

from typing import NamedTuple

# Supported bits of a weight's accumulator; 0 means no accumulator.
ACCUMULATOR_BITS = (0, 2, 4, 8)


class Code(NamedTuple):
    """A format of integer codes. A weight is its code times the scale of its vector.

    Attributes:
        bits: storage bits of a code, in two's complement.
        top: largest code. Codes lie in [-top, top], which is 2 top + 1 levels.
        spread: target RMS of a vector's codes, as a share of `top`. It is near the value at which
            rounding and clipping of normal weights together cost least.
        accumulators: bits of accumulators that the update supports.
        in_kernels: bits of accumulators that the TPU and GPU kernels update. It is empty for codes
            that no kernel reads. XLA does all other updates, and the log reports it.
    """

    bits: int
    top: int
    spread: float
    accumulators: tuple[int, ...] = ACCUMULATOR_BITS
    in_kernels: tuple[int, ...] = ()


CODES = {
    "int8": Code(bits=8, top=127, spread=0.25, in_kernels=(8,)),
    "int4": Code(bits=4, top=7, spread=0.37, in_kernels=(4,)),
    "int3": Code(bits=4, top=3, spread=0.51, in_kernels=(4,)),
    "ternary": Code(bits=2, top=1, spread=0.82),
}


def accumulator_bits_of(storage: str, bits: int | None) -> int:
    """Returns `bits`, or the bits of a code of the storage (0 for floats) if `bits` is `None`.

    Raises:
        ValueError: if the update supports no accumulators of `bits` bits.
    """
    if bits is None:
        return CODES[storage].bits if storage in CODES else 0
    taken = CODES[storage].accumulators if storage in CODES else ACCUMULATOR_BITS
    if bits not in taken:
        raise ValueError(f"accumulators have {' or '.join(map(str, taken))} bits, not {bits}")
    return bits


def why_no_kernel_reads(storage: str) -> str | None:
    """Returns why kernels cannot read a packed storage, or `None` if they can."""
    code = CODES[storage]
    return None if code.in_kernels else f"it reads codes of 4 or 8 bits, not of {code.bits}"


def why_no_kernel_updates(storage: str, accumulator_bits: int) -> str | None:
    """Returns why kernels cannot update a packed storage, or `None` if they can."""
    if accumulator_bits in CODES[storage].in_kernels:
        return None
    return why_no_kernel_reads(storage) or (
        f"its accumulators are as wide as the codes, not of {accumulator_bits} bits"
    )
