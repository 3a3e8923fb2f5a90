import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerjax.data.documents import (
    VALIDATION,
    Document,
    corpus_digest,
    split_of,
    without_duplicates,
)


def documents(*texts):
    return [Document("d", str(number), text) for number, text in enumerate(texts)]


def test_digest_depends_on_text_and_domain_only():
    one, two = documents("one", "two")
    assert corpus_digest([one, two]) == corpus_digest([two, one])
    renamed = Document("d", "another name", "one")
    assert corpus_digest([renamed, two]) == corpus_digest([one, two])
    assert corpus_digest([Document("e", "0", "one"), two]) != corpus_digest([one, two])
    assert corpus_digest(documents("one", "twO")) != corpus_digest([one, two])


def test_duplicates_and_empty_documents_are_dropped():
    kept = without_duplicates(documents("one", "two", "one", " \n", ""))
    assert [document.text for document in kept] == ["one", "two"]


@given(st.text(), st.text())
def test_a_split_is_the_documents_own_affair(text, name):
    assert split_of(Document("a", name, text), 0.3) == split_of(Document("b", "x", text), 0.3)


def test_splits_have_the_stated_size():
    many = documents(*map(str, range(4000)))
    share = np.mean([split_of(document, 0.05) == VALIDATION for document in many])
    assert share == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / 4000))
