"""Reading and unpacking lines (a `row` in code) of packed pools in kernels for NVIDIA GPUs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.row_layout import RowLayout
from pallas_kernels.storage import UNIT

MANTISSA = 0x4B000000  # bits of the float 2^23, the last of which has the value 1


class Rows(NamedTuple):
    """Lines of a block's pairs, in a kernel.

    Attributes:
        words_ref: words of the stack.
        layer: layer to read.
        unit_ref: first unit of each pair's line.
        slot_ref: slot of each pair's expert, which is its place in the line.
        slots: slot of each lane, one array per unit.
        block: index of the block's pairs in `unit_ref` and `slot_ref`.
        num_pairs: number of pairs of the block.
        at_once: number of lines that are read together.
        layout: layout of the lines.
    """

    words_ref: Any
    layer: Array
    unit_ref: Any
    slot_ref: Any
    slots: list[Array]
    block: tuple[Array, Array]
    num_pairs: int
    at_once: int
    layout: RowLayout

    def read(self, first: Array, which: int) -> list[list[Array]]:
        """Returns the words of `down` or `up` of some pairs by unit; 0 at those of other experts.

        Args:
            first: first pair.
            which: vector to read, `down` (0) or `up` (1).
        """
        # After the last group, read it once more.
        first = jnp.minimum(first, self.num_pairs - self.at_once)
        units, found = self.layout.units_of(which), []
        for index in range(self.at_once):
            pair = (*self.block, first + index)
            begin = self.unit_ref[pair]
            row = [self.words_ref[self.layer, begin + unit] for unit in units]
            if self.layout.experts > 1:
                own = self.slot_ref[pair]
                row = [
                    jnp.where(self.slots[unit] == own, words, 0)
                    for unit, words in zip(units, row, strict=True)
                ]
            found.append(row)
        return found

    def walk(
        self,
        body: Callable[..., Any],
        start: Array,
        groups: Array,
        which: int,
        first: list[list[Array]],
        carry: Any,
    ) -> Any:
        """Processes groups of pairs, and loads the words of the next group meanwhile.

        Args:
            body: function of the number of a group, the words of its pairs, and the value that
                `body` last returned.
            start: first pair.
            groups: number of groups.
            which: vector to read, `down` (0) or `up` (1).
            first: words of the first group.
            carry: value for the first call of `body`, in place of a returned value.

        Returns:
            The value that `body` last returned.
        """

        def step(group: Array, state: Any) -> Any:
            words, carry = state
            following = self.read(start + (group + 1) * self.at_once, which)
            return following, body(group, words, carry)

        return jax.lax.fori_loop(0, groups, step, (first, carry))[1]


def product_of(
    row: list[Array], image: list[list[Array]], mantissa: Array, layout: RowLayout
) -> Array:
    """Returns each thread's part of the product of a line's codes and an image."""
    terms = [
        code * column
        for word, columns in zip(row, image, strict=True)
        for code, column in zip(codes_of(word, mantissa, layout), columns, strict=True)
    ]
    return functools.reduce(jnp.add, terms)


def image_of(vector: Float[Array, "T D"], which: int, layout: RowLayout) -> Array:
    """Puts a vector at the codes that it is multiplied with, [T, units, planes, 128].

    Divides it by the factors that `codes_of` leaves in the codes.
    """
    image = layout.spread(vector.astype(jnp.float32), which)[:, :, layout.span(which)]
    image = image * _inverse_factors(layout)[:, None]
    return image.reshape(*image.shape[:2], -1, UNIT).swapaxes(1, 2)


def vector_of(sums: Float[Array, "T units planes 128"], which: int, layout: RowLayout) -> Array:
    """Reverses `image_of`: adds up the values at all places of each column, and returns [T, D]."""
    image = sums.swapaxes(1, 2).reshape(sums.shape[0], layout.planes, -1)
    return layout.collect(image * _inverse_factors(layout)[:, None], which)


def _shift(plane: int, layout: RowLayout) -> tuple[int, int]:
    """Returns by how many bits `codes_of` moves a plane's codes down, and their lowest bit then."""
    together = 20 // layout.bits
    return plane // together * together * layout.bits, plane % together * layout.bits


def _inverse_factors(layout: RowLayout) -> Float[Array, " planes"]:
    return jnp.array([2.0 ** -_shift(plane, layout)[1] for plane in range(layout.planes)])


def codes_of(
    words: Int[Array, " 128"], mantissa: Int[Array, ""], layout: RowLayout
) -> list[Float[Array, " 128"]]:
    """Returns the codes of words by plane, each times a power of two.

    Flipping the sign bit of a code in two's complement gives a number that is not negative. Left in
    place, among the low bits of the float 2^23, it is exactly that number times a power of two.
    This takes one bitwise instruction and a subtraction. GPUs convert integers at a fraction of
    that speed.

    Args:
        words: words of a line.
        mantissa: `MANTISSA`, as a value that is unknown when the kernel is compiled. An instruction
            takes one constant, and that is the mask.
        layout: layout of the line.
    """
    signs = sum(1 << (layout.bits * plane + layout.bits - 1) for plane in range(layout.planes))
    words = words ^ (signs - (1 << 32))
    codes = []
    for plane in range(layout.planes):
        down, place = _shift(plane, layout)
        moved = jax.lax.shift_right_logical(words, down) if down else words
        number = (moved & (((1 << layout.bits) - 1) << place)) | mantissa
        sign = 1 << (layout.bits - 1 + place)
        codes.append(jax.lax.bitcast_convert_type(number, jnp.float32) - float((1 << 23) + sign))
    return codes
