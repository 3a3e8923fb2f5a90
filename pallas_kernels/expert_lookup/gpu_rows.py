"""Rows of packed pools in kernels for NVIDIA GPUs: how a block reads and unpacks them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.row_layout import RowLayout
from pallas_kernels.storage import UNIT

MANTISSA = 0x4B000000  # the bits of the float 2^23, whose last one is worth 1


class Rows(NamedTuple):
    """The rows of a block's pairs, in a kernel.

    Attributes:
        words_ref: the stack.
        layer: whose rows are read.
        unit_ref: where the row of each pair begins.
        slot_ref: which of the row's experts it is about.
        slots: by unit, which expert the lanes belong to.
        block: where the block's pairs are in `unit_ref` and `slot_ref`.
        num_pairs: how many there are.
        at_once: how many are read together.
        layout: of the rows.
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
        """The words of `down` or `up` of some pairs, unit by unit; 0 where another expert's are."""
        # After the last group, the last once more.
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
        """Goes through groups of pairs; the next one's words are on their way meanwhile.

        Args:
            body: called with the number of a group, the words of its pairs, and what it returned.
            start: the first pair.
            groups: how many.
            which: whether `down` or `up` is read.
            first: the words of the first group.
            carry: what `body` takes in the place of what it returned, at first.
        """

        def step(group: Array, state: Any) -> Any:
            words, carry = state
            following = self.read(start + (group + 1) * self.at_once, which)
            return following, body(group, words, carry)

        return jax.lax.fori_loop(0, groups, step, (first, carry))[1]


def product_of(
    row: list[Array], image: list[list[Array]], mantissa: Array, layout: RowLayout
) -> Array:
    """Each thread's part of the product of a row's codes and an image."""
    terms = [
        code * column
        for word, columns in zip(row, image, strict=True)
        for code, column in zip(codes_of(word, mantissa, layout), columns, strict=True)
    ]
    return functools.reduce(jnp.add, terms)


def image_of(vector: Float[Array, "T D"], which: int, layout: RowLayout) -> Array:
    """A vector where the codes are that it is multiplied with, [T, units, planes, 128].

    Divided by the factors that `codes_of` leaves in the codes.
    """
    image = layout.spread(vector.astype(jnp.float32), which)[:, :, layout.span(which)]
    image = image * _inverse_factors(layout)[:, None]
    return image.reshape(*image.shape[:2], -1, UNIT).swapaxes(1, 2)


def vector_of(sums: Float[Array, "T units planes 128"], which: int, layout: RowLayout) -> Array:
    """The reverse: what all places of a column hold, added up; [T, D]."""
    image = sums.swapaxes(1, 2).reshape(sums.shape[0], layout.planes, -1)
    return layout.collect(image * _inverse_factors(layout)[:, None], which)


def _shift(plane: int, layout: RowLayout) -> tuple[int, int]:
    """By how many bits `codes_of` moves a plane's codes down, and where they are then."""
    together = 20 // layout.bits
    return plane // together * together * layout.bits, plane % together * layout.bits


def _inverse_factors(layout: RowLayout) -> Float[Array, " planes"]:
    return jnp.array([2.0 ** -_shift(plane, layout)[1] for plane in range(layout.planes)])


def codes_of(
    words: Int[Array, " 128"], mantissa: Int[Array, ""], layout: RowLayout
) -> list[Float[Array, " 128"]]:
    """The codes of words, plane by plane, times a power of two each.

    A code in two's complement, its sign flipped, is a positive number. Left where it is, among the
    low bits of the float 2^23, it is that number times a power of two, exactly: one bitwise
    instruction and a subtraction, where GPUs convert integers at a fraction of that speed.

    Args:
        words: of a row.
        mantissa: `MANTISSA`, not known when the kernel is compiled: there is room for one constant
            in an instruction, and that is the mask.
        layout: of the row.
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
