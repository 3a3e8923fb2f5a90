"""The formats of packed weights: how many levels a code has, and how many bits hold it."""

from typing import NamedTuple

# Bits that the accumulator of a weight may have; 0 for none.
ACCUMULATOR_BITS = (0, 2, 4, 8)


class Code(NamedTuple):
    """A format of integer codes; a weight is its code times the scale of its vector.

    Attributes:
        bits: storage of a code, two's complement.
        top: the largest code. Codes lie in [-top, top], so that there are 2 top + 1 levels.
        spread: the RMS of a vector's codes that its scale aims at, as a share of `top`. It is near
            where rounding and clipping of normal weights together cost least.
        accumulators: bits of accumulators that the update takes.
        in_kernels: bits of accumulators with which the kernels for TPUs and GPUs update. Empty for
            codes that no kernel reads. XLA does the rest, which the log says.
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
    """How wide the accumulators of a storage are: as its codes, unless a width is given.

    Raises:
        ValueError: if there are no accumulators of that width.
    """
    if bits is None:
        return CODES[storage].bits if storage in CODES else 0
    taken = CODES[storage].accumulators if storage in CODES else ACCUMULATOR_BITS
    if bits not in taken:
        raise ValueError(f"accumulators have {' or '.join(map(str, taken))} bits, not {bits}")
    return bits


def why_no_kernel_reads(storage: str) -> str | None:
    """Why kernels cannot read a packed storage; `None` if they can."""
    code = CODES[storage]
    return None if code.in_kernels else f"it reads codes of 4 or 8 bits, not of {code.bits}"


def why_no_kernel_updates(storage: str, accumulator_bits: int) -> str | None:
    """Why kernels cannot update a packed storage; `None` if they can."""
    if accumulator_bits in CODES[storage].in_kernels:
        return None
    return why_no_kernel_reads(storage) or (
        f"its accumulators are as wide as the codes, not {accumulator_bits} bits"
    )
