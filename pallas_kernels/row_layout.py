"""Rows of packed pools, as kernels see them.

A row (`pallas_kernels.storage`) is what a kernel reads or writes as a whole: one expert, or the
fewest that fill units together. Unpacked it is [planes, lanes]: `planes` codes of each word, one
word a lane. What belongs to one expert, or to `down` or `up`, is told by masks over lanes; a vector
of the width of the model is spread over the same [planes, lanes], so that products of codes and
vectors need no lane to move.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.codes import CODES, Code
from pallas_kernels.packing import codes_per_word
from pallas_kernels.storage import (
    UNIT,
    experts_per_row,
    units_per_row,
    words_per_expert,
)


class RowLayout(NamedTuple):
    """Sizes of a row.

    Attributes:
        code: format of the codes.
        planes: codes a word holds.
        words: words of one vector, W.
        experts: experts a row holds.
        units: units a row fills.
    """

    code: Code
    planes: int
    words: int
    experts: int
    units: int

    @staticmethod
    def of(width: int, storage: str) -> RowLayout:
        """The layout of packed pools of a width."""
        return RowLayout(
            code=CODES[storage],
            planes=codes_per_word(CODES[storage].bits),
            words=words_per_expert(width, storage) // 2,
            experts=experts_per_row(width, storage),
            units=units_per_row(width, storage),
        )

    @property
    def bits(self) -> int:
        """Storage of a code."""
        return self.code.bits

    @property
    def lanes(self) -> int:
        """Words of a row."""
        return self.units * UNIT

    def span(self, vector: int) -> slice:
        """The fewest lanes, in whole units, that hold every `down` (0) or `up` (1) of a row."""
        if self.experts == 1 and self.words % UNIT == 0:
            return slice(vector * self.words, (vector + 1) * self.words)
        return slice(0, self.lanes)

    def units_of(self, vector: int) -> range:
        """The units that hold every `down` (0) or `up` (1) of a row."""
        return units_in(self.span(vector))

    def vector_of(self, lane: Int[Array, "*S"]) -> Int[Array, "*S"]:
        """Whether lanes belong to `down` (0) or `up` (1)."""
        return lax.div(lax.rem(lane, 2 * self.words), self.words)

    def slot_of(self, lane: Int[Array, "*S"]) -> Int[Array, "*S"]:
        """Which of the row's experts lanes belong to."""
        return lax.div(lane, 2 * self.words)

    def column_of(self, plane: Int[Array, "..."], lane: Int[Array, "..."]) -> Int[Array, "..."]:
        """Which column of `down` or `up` a code is."""
        return plane * self.words + lax.rem(lane, self.words)

    def spread(self, x: Float[Array, "T D"], vector: int) -> Float[Array, "T planes lanes"]:
        """Puts x where the codes of every `down` (0) or `up` (1) of a row are, zeros elsewhere."""
        by_plane = x.reshape(-1, self.planes, self.words)
        zeros = jnp.zeros_like(by_plane)
        expert = jnp.concatenate(
            [zeros if vector else by_plane, by_plane if vector else zeros], axis=-1
        )
        return jnp.tile(expert, (1, 1, self.experts))

    def collect(self, image: Float[Array, "T planes span"], vector: int) -> Float[Array, "T D"]:
        """Adds up what the `span` of every `down` (0) or `up` (1) of a row holds."""
        if image.shape[-1] != self.words:
            by_slot = image.reshape(*image.shape[:2], self.experts, 2, self.words)
            image = jnp.sum(by_slot[:, :, :, vector], axis=2)
        return image.reshape(image.shape[0], -1)


def units_in(span: slice) -> range:
    """The units that a span of lanes fills."""
    return range(span.start // UNIT, span.stop // UNIT)
