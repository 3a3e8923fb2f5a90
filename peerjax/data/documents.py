"""Reads documents of text by domain, splits them and computes their digests."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from peerjax.data.text_files import documents_in, empty_file, find_files, read_blocks

TRAIN, VALIDATION = "train", "validation"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, with a name that is the same on every machine."""

    domain: str
    name: str
    text: str

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).digest()


def read_text(path: Path) -> str:
    """Reads a UTF-8 file.

    Raises:
        DataError: if the file is not UTF-8.
    """
    return "".join(read_blocks(path))


def read_files(pattern: str, text_field: str) -> list[Document]:
    """Reads the documents of files: one per UTF-8 text file, or one per JSON line.

    Args:
        pattern: globs of the files, as in `find_files`.
        text_field: the field of a JSON line that holds the text.

    Raises:
        ConfigError: if the pattern has no globs.
        DataError: if no file matches, or a file is empty, unreadable or has a bad line.
    """
    documents: list[Document] = []
    for domain, path in find_files(pattern):
        texts = [(found.name, "".join(found.blocks)) for found in documents_in(path, text_field)]
        if not any(text.strip() for _, text in texts):
            raise empty_file(path)
        documents += [Document(domain, name, text) for name, text in texts]
    return documents


def without_duplicates(documents: Sequence[Document]) -> list[Document]:
    """Drops empty documents and later copies of equal ones."""
    first_of: dict[bytes, Document] = {}
    for document in documents:
        if document.text.strip():
            first_of.setdefault(document.digest, document)
    return list(first_of.values())


def by_digest(documents: Sequence[Document]) -> list[Document]:
    """Sorts documents by domain, in order of first appearance, and then by digest.

    The names of documents do not affect the order.
    """
    domains = [*dict.fromkeys(document.domain for document in documents)]
    return sorted(documents, key=lambda each: (domains.index(each.domain), each.digest))


def split_of(document: Document, validation_fraction: float) -> str:
    """Returns the split of a document. It depends on the hash of this document's text only."""
    draw = int.from_bytes(document.digest[:8], "big") / 2**64
    return VALIDATION if draw < validation_fraction else TRAIN


def corpus_digest(documents: Sequence[Document]) -> str:
    """Returns the SHA-256 of all documents and domains, regardless of order and names."""
    total = hashlib.sha256()
    for entry in sorted((document.domain.encode(), document.digest) for document in documents):
        total.update(b"\0".join(entry))
    return total.hexdigest()


def digest_in_order(corpus: str, order: str) -> str:
    """Returns the SHA-256 of a corpus and of its order, on which rows depend.

    Args:
        corpus: digest of the documents, from `corpus_digest`.
        order: SHA-256 of the documents' digests in order.
    """
    return hashlib.sha256((corpus + order).encode()).hexdigest()


def order_digest(documents: Iterable[Document]) -> str:
    """Returns the SHA-256 of the documents' digests in order."""
    return hashlib.sha256(b"".join(document.digest for document in documents)).hexdigest()
