"""Documents packed into rows of equal length, with their boundaries kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Int


class Row(TypedDict):
    """One row, or a batch of rows with a leading axis.

    Every document begins with the end-of-text token, so the target of a document's last token
    is that token, whatever document follows: no target asks about another document.
    """

    inputs: Int[np.ndarray, "*B L"]
    targets: Int[np.ndarray, "*B L"]
    positions: Int[np.ndarray, "*B L"]
    segments: Int[np.ndarray, "*B L"]
    row: Int[np.ndarray, "*B"]


class PackedRows:
    """A random-access source of rows: documents end to end, cut every L tokens.

    Random access is what makes a run resumable from one number, and its data the same whatever
    the number of processes and workers. A document that is cut goes on in the next row, without
    sight of what came before; nothing is padded.

    Attributes:
        tokens: all documents, one after the other.
        starts: where each document begins.
        length: L.
    """

    def __init__(self, documents: Sequence[Int[np.ndarray, " n"]], length: int):
        self.length = length
        self.tokens = np.concatenate([*documents, np.zeros(0, np.int32)])
        sizes = [len(document) for document in documents]
        self.starts = np.cumsum([0, *sizes[:-1]]) if sizes else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    def __getitem__(self, index: int) -> Row:
        first = int(index) * self.length
        places = np.arange(first, first + self.length)
        document = np.searchsorted(self.starts, places, side="right") - 1
        tokens = self.tokens[first : first + self.length + 1]
        return Row(
            inputs=tokens[:-1],
            targets=tokens[1:],
            # Counted from the row's first token where a document goes on from the row before.
            positions=(places - np.maximum(self.starts[document], first)).astype(np.int32),
            segments=(document - document[0]).astype(np.int32),
            row=np.array(index, np.int32),
        )
