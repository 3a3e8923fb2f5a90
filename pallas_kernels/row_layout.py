"""Layout of the lines of packed pools in kernels.

A kernel reads or writes a line (a `row` in code) as a whole. A line is one expert, or the smallest
group of experts that fills whole units (`pallas_kernels.storage`). Unpacked, a line has the shape
[planes, lanes], with one word per lane and `planes` codes per word. Masks over lanes select one
expert, or its `down` or `up`. A vector of the width of the model is spread over the same
[planes, lanes]. Products of codes and vectors therefore move no data between lanes.
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
    """Sizes of a line.

    Attributes:
        code: format of the codes.
        planes: codes per word.
        words: words per vector, W.
        experts: experts per line.
        units: units per line.
    """

    code: Code
    planes: int
    words: int
    experts: int
    units: int

    @staticmethod
    def of(width: int, storage: str) -> RowLayout:
        """Returns the layout of packed pools of a width."""
        return RowLayout(
            code=CODES[storage],
            planes=codes_per_word(CODES[storage].bits),
            words=words_per_expert(width, storage) // 2,
            experts=experts_per_row(width, storage),
            units=units_per_row(width, storage),
        )

    @property
    def bits(self) -> int:
        """Storage bits of a code."""
        return self.code.bits

    @property
    def lanes(self) -> int:
        """Words of a line."""
        return self.units * UNIT

    def span(self, vector: int) -> slice:
        """Returns the span of lanes that holds every `down` (0) or `up` (1) of a line.

        It is the shortest span of whole units.
        """
        if self.experts == 1 and self.words % UNIT == 0:
            return slice(vector * self.words, (vector + 1) * self.words)
        return slice(0, self.lanes)

    def units_of(self, vector: int) -> range:
        """Returns the units that hold every `down` (0) or `up` (1) of a line."""
        return units_in(self.span(vector))

    def vector_of(self, lane: Int[Array, "*S"]) -> Int[Array, "*S"]:
        """Returns whether lanes belong to `down` (0) or `up` (1)."""
        return lax.div(lax.rem(lane, 2 * self.words), self.words)

    def slot_of(self, lane: Int[Array, "*S"]) -> Int[Array, "*S"]:
        """Returns the slots of lanes: the places in the line of the experts they belong to."""
        return lax.div(lane, 2 * self.words)

    def column_of(self, plane: Int[Array, "..."], lane: Int[Array, "..."]) -> Int[Array, "..."]:
        """Returns the columns of `down` or `up` that codes belong to."""
        return plane * self.words + lax.rem(lane, self.words)

    def spread(self, x: Float[Array, "T D"], vector: int) -> Float[Array, "T planes lanes"]:
        """Puts x at the codes of every `down` (0) or `up` (1) of a line, and zeros elsewhere."""
        by_plane = x.reshape(-1, self.planes, self.words)
        zeros = jnp.zeros_like(by_plane)
        expert = jnp.concatenate(
            [zeros if vector else by_plane, by_plane if vector else zeros], axis=-1
        )
        return jnp.tile(expert, (1, 1, self.experts))

    def joined(
        self, x: Float[Array, "T D"], dy: Float[Array, "T D"]
    ) -> Float[Array, "T planes lanes"]:
        """Puts x at the codes of every `down` of a line, and dy at those of every `up`."""
        by_plane = [each.reshape(-1, self.planes, self.words) for each in (x, dy)]
        return jnp.tile(jnp.concatenate(by_plane, axis=-1), (1, 1, self.experts))

    def collect(self, image: Float[Array, "T planes span"], vector: int) -> Float[Array, "T D"]:
        """Adds up the values at every `down` (0) or `up` (1) of a line, given those of its span."""
        if image.shape[-1] != self.words:
            by_slot = image.reshape(*image.shape[:2], self.experts, 2, self.words)
            image = jnp.sum(by_slot[:, :, :, vector], axis=2)
        return image.reshape(image.shape[0], -1)


def units_in(span: slice) -> range:
    """Returns the units that a span of lanes fills."""
    return range(span.start // UNIT, span.stop // UNIT)
