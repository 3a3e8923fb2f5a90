import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerjax.data.documents import (
    TEXT_PACKAGES,
    VALIDATION,
    Document,
    corpus_digest,
    read_packages,
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


def test_the_default_text_is_the_pinned_one():
    kept = without_duplicates(read_packages(list(TEXT_PACKAGES)))
    by_domain = {domain: 0 for domain in TEXT_PACKAGES}
    for document in kept:
        by_domain[document.domain] += len(document.text.encode())
    assert by_domain == {"speeches": 12_185_751, "drama": 5_318_858, "code": 16_141_585}
    expected = "6e14189cf0ff070fbfd8d97473b7fdc92182c71ab4da1e060b1f9fe53b55fdbd"
    assert corpus_digest(kept) == expected
