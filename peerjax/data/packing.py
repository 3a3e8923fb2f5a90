"""Packs documents into rows of equal length, and keeps their boundaries."""

from __future__ import annotations

from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Int


class Row(TypedDict):
    """One row, or a batch of rows with a leading axis.

    Every document begins with the end-of-text token. The target of a document's last token is
    therefore always that token, so no target depends on another document.
    """

    inputs: Int[np.ndarray, "*B L"]
    targets: Int[np.ndarray, "*B L"]
    positions: Int[np.ndarray, "*B L"]
    segments: Int[np.ndarray, "*B L"]
    row: Int[np.ndarray, "*B"]


@runtime_checkable
class TokenStream(Protocol):
    """Concatenated documents as int32 tokens: an array, or an object that is sliced like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Int[np.ndarray, " n"]: ...


class PackedRows:
    """A random-access source of rows: concatenated documents, cut every L tokens.

    With random access, one number is enough to resume a run. The data also does not depend on the
    number of processes and workers. A document that is cut continues in the next row, without the
    part before the cut. Rows are not padded.

    Attributes:
        tokens: all documents, concatenated.
        length: L, the number of tokens of a row.
        end_of_text: the token that begins every document and occurs nowhere else.
    """

    def __init__(self, tokens: TokenStream, length: int, end_of_text: int):
        self.tokens = tokens
        self.length = length
        self.end_of_text = end_of_text

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    @property
    def mix(self) -> list[tuple[range, float]]:
        """Numbers of the rows, which are read in proportion to one weight."""
        return [(range(len(self)), 1.0)]

    def __getitem__(self, index: int) -> Row:
        first = int(index) * self.length
        tokens = self.tokens[first : first + self.length + 1]
        places = np.arange(self.length, dtype=np.int32)
        # A document that continues from the previous row is treated as if it began here.
        begins = (tokens[:-1] == self.end_of_text) | (places == 0)
        return Row(
            inputs=tokens[:-1],
            targets=tokens[1:],
            positions=places - np.maximum.accumulate(np.where(begins, places, 0)),
            segments=np.cumsum(begins, dtype=np.int32) - 1,
            row=np.array(index, np.int32),
        )
