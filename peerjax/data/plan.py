"""Plans which document goes into which shard, before any shard is made.

A scan reads all text once. It keeps the place, digest and size of every document. Together with
the memory for sorting, this takes about 250 bytes per document.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from peerjax.data.documents import TRAIN, VALIDATION
from peerjax.data.text_files import TextFile, documents_in, empty_file, read_document
from peerjax.errors import DataError


class Documents(NamedTuple):
    """Several documents, without their text.

    Attributes:
        files: index of each document's file in a list of files.
        offsets: first byte of each document in its file.
        lengths: bytes of each document in its file.
        sizes: bytes of each text in UTF-8.
        digests: SHA-256 of each text.
    """

    files: Int[np.ndarray, " n"]
    offsets: Int[np.ndarray, " n"]
    lengths: Int[np.ndarray, " n"]
    sizes: Int[np.ndarray, " n"]
    digests: UInt8[np.ndarray, "n 32"]

    def at(self, chosen: Any) -> Documents:
        """Returns the documents that an index, slice or mask selects."""
        return Documents(*(field[chosen] for field in self))


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """A shard to be made. It holds the documents `first` to `stop - 1` of the plan."""

    name: str
    split: str
    domain: str
    first: int
    stop: int
    text_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """All documents in the order of the shards, without duplicates.

    Attributes:
        files: all files; `documents.files` are indices of this list.
        skipped: error messages of the files that cannot be used.
        documents: the documents in order.
        shards: the shards in order.
        corpus: digest of the documents, equal to that of `corpus_digest`.
        order: SHA-256 of the documents' digests in order.
    """

    files: list[TextFile]
    skipped: list[str]
    documents: Documents
    shards: list[PlannedShard]
    corpus: str
    order: str

    def to_json(self) -> dict[str, Any]:
        """Returns the part of the plan that must not change when preparation resumes."""
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        return {
            "corpus": self.corpus,
            "order": self.order,
            "skipped": self.skipped,
            "shards": shards,
        }


def scan(
    numbered: Sequence[tuple[int, TextFile]], text_field: str, count: Callable[[int], None]
) -> tuple[Documents, list[tuple[int, str]]]:
    """Reads files, and collects the information that a plan needs.

    Args:
        numbered: files and their numbers.
        text_field: the field of a JSON line that holds the text.
        count: called with the number of bytes of every block of text that was read.

    Returns:
        The documents that have text, and the number and error message of every file that cannot
        be used.
    """
    found: tuple[array[int], ...] = tuple(array("q") for _ in range(4))
    digests = bytearray()
    faults = []
    for number, file in numbered:
        before = len(found[0])
        try:
            for document in documents_in(file.path, text_field):
                digest, size, blank = hashlib.sha256(), 0, True
                for data, text in _encoded(document.blocks):
                    digest.update(data)
                    size += len(data)
                    blank = blank and not text.strip()
                    count(len(data))
                if not blank:
                    values = (number, document.offset, document.length, size)
                    for column, value in zip(found, values, strict=True):
                        column.append(value)
                    digests += digest.digest()
            if len(found[0]) == before:
                raise empty_file(file.path)
        except DataError as error:
            faults.append((number, str(error)))
            for column in found:
                del column[before:]
            del digests[32 * before :]
    numbers, offsets, lengths, sizes = (np.array(column, np.int64) for column in found)
    matrix = np.frombuffer(bytes(digests), np.uint8).reshape(-1, 32)
    return Documents(numbers, offsets, lengths, sizes, matrix), faults


def make_plan(
    files: Sequence[TextFile],
    found: Iterable[Documents],
    skipped: list[str],
    validation_fraction: float,
    shard_bytes: int,
) -> Plan:
    """Drops later copies of equal documents, splits the rest and distributes them over shards.

    Args:
        files: all files, in order.
        found: documents in the order of their files.
        skipped: error messages of the files that cannot be used.
        validation_fraction: share of the documents held out for validation.
        shard_bytes: bytes of text in a shard. The last document of a shard may exceed them.
    """
    documents = Documents(*(np.concatenate(field) for field in zip(*found, strict=True)))
    documents = documents.at(_first_of_equals(documents.digests))
    names = list(dict.fromkeys(file.domain for file in files))
    domain_of_file = np.array([names.index(file.domain) for file in files])
    domains = domain_of_file[documents.files]
    held_out = in_validation(documents.digests, validation_fraction)
    corpus = _corpus_digest(documents, domains, names)

    order = np.lexsort((domains, held_out))  # stable: files and lines stay in order
    documents, domains, held_out = documents.at(order), domains[order], held_out[order]
    shards: list[PlannedShard] = []
    for split in (TRAIN, VALIDATION):
        for number, domain in enumerate(names):
            here = np.flatnonzero((held_out == (split == VALIDATION)) & (domains == number))
            sizes = documents.sizes[here]
            numbers = (np.cumsum(sizes) - sizes) // shard_bytes
            for place, part in enumerate(np.unique(numbers)):
                first, stop = here[np.flatnonzero(numbers == part)[[0, -1]]]
                name = f"{split}-{domain}-{place:05d}.array_record"
                size = int(documents.sizes[first : stop + 1].sum())
                shards.append(PlannedShard(name, split, domain, int(first), int(stop) + 1, size))
    order_digest = hashlib.sha256(documents.digests.tobytes()).hexdigest()
    return Plan(list(files), skipped, documents, shards, corpus, order_digest)


def check_splits(plan: Plan) -> None:
    """Checks that both splits have text of every domain.

    Raises:
        DataError: if there is no text, or a split has no text of a domain. The message names them.
    """
    if not plan.shards:
        raise DataError("none of the files has text that can be used")
    there = {(shard.split, shard.domain) for shard in plan.shards}
    counts = {domain: 0 for _, domain in there}
    for shard in plan.shards:
        counts[shard.domain] += shard.stop - shard.first
    for domain, count in counts.items():
        for split in (TRAIN, VALIDATION):
            if (split, domain) not in there:
                raise DataError(
                    f"none of the {count} documents of domain {domain!r} is in the {split} split, "
                    "because whole documents are split by their hash; cut the text into more "
                    "documents or change validation_fraction"
                )


def read_planned(
    files: Sequence[TextFile], documents: Documents, text_field: str, count: Callable[[int], None]
) -> Iterator[Iterator[str]]:
    """Reads documents of a plan again, and yields an iterator over the parts of each text.

    Raises:
        DataError: if a document has changed since it was scanned.
    """

    def checked(file: Path, which: int) -> Iterator[str]:
        digest = hashlib.sha256()
        offset, length = int(documents.offsets[which]), int(documents.lengths[which])
        try:
            for data, text in _encoded(read_document(file, offset, length, text_field)):
                digest.update(data)
                count(len(data))
                yield text
        except DataError as error:
            raise DataError(f"{file} has changed since it was scanned: {error}") from None
        if digest.digest() != documents.digests[which].tobytes():
            raise DataError(f"{file} has changed since it was scanned; restore the text")

    for which, number in enumerate(documents.files):
        yield checked(files[number].path, which)


def in_validation(digests: UInt8[np.ndarray, "n 32"], fraction: float) -> Bool[np.ndarray, " n"]:
    """Returns a mask of the documents that `split_of` puts into validation."""
    draws = np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0]
    return draws.astype(np.float64) / 2.0**64 < fraction


def _first_of_equals(digests: UInt8[np.ndarray, "n 32"]) -> Int[np.ndarray, " m"]:
    """Returns the index of the first document with each digest, in order."""
    if not len(digests):
        return np.zeros(0, np.int64)
    return np.sort(np.unique(_sortable(digests), return_index=True)[1])


def _corpus_digest(documents: Documents, domains: np.ndarray, names: Sequence[str]) -> str:
    """Computes `documents.corpus_digest` without a list of all entries."""
    total = hashlib.sha256()
    for name in sorted(names, key=str.encode):
        own = documents.digests[domains == names.index(name)]
        prefix = np.frombuffer(name.encode() + b"\0", np.uint8)
        in_order = own[np.argsort(_sortable(own))]
        for first in range(0, len(own), 1 << 16):
            part = in_order[first : first + (1 << 16)]
            prefixes = np.broadcast_to(prefix, (len(part), len(prefix)))
            total.update(np.concatenate([prefixes, part], axis=1).tobytes())
    return total.hexdigest()


def _sortable(digests: UInt8[np.ndarray, "n 32"]) -> np.ndarray:
    """Returns digests as strings of 32 bytes, which NumPy compares as a whole."""
    return np.ascontiguousarray(digests).view("S32")[:, 0]


def _encoded(blocks: Iterable[str]) -> Iterator[tuple[bytes, str]]:
    return ((block.encode(), block) for block in blocks)
