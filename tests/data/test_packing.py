import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from peerjax.data.packing import PackedRows

END = 0
documents = st.lists(
    st.lists(st.integers(1, 99), min_size=0, max_size=40).map(
        lambda tokens: np.array([END, *tokens], np.int32)
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=80)
@given(documents, st.integers(1, 16))
def test_rows_hold_every_token_once_with_its_document(documents, length):
    stream = np.concatenate(documents)
    rows = PackedRows(stream, length, END)
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    assert len(rows) == (len(stream) - 1) // length
    for index in range(len(rows)):
        row, first = rows[index], index * length
        np.testing.assert_array_equal(row["inputs"], stream[first : first + length])
        np.testing.assert_array_equal(row["targets"], stream[first + 1 : first + length + 1])
        part = owner[first : first + length]
        # Two tokens share a segment exactly when they share a document.
        np.testing.assert_array_equal(
            row["segments"][:, None] == row["segments"][None], part[:, None] == part[None]
        )
        for segment in np.unique(row["segments"]):
            places = row["positions"][row["segments"] == segment]
            np.testing.assert_array_equal(places, np.arange(len(places)))


def test_no_target_is_the_content_of_another_document():
    rows = PackedRows(np.array([END, 5, 6, END, 7, 8, 9, END, 1], np.int32), 8, END)
    row = rows[0]
    last_of_segment = row["segments"][:-1] != row["segments"][1:]
    assert last_of_segment.sum() == 2
    assert (row["targets"][:-1][last_of_segment] == END).all()
