"""Writes the tokens of a prepared corpus to files, and reads them in training.

A shard is an ArrayRecord file. It holds the concatenated tokens of whole documents, cut into
records of equal length. The shards of one split and domain, in order, are one stream of tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from peerjax.data.documents import digest_in_order
from peerjax.data.records import count_records, open_records, write_records
from peerjax.errors import DataError

INDEX, TOKENIZER = "index.json", "tokenizer.json"
FORMAT = 1
RECORD_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of tokens.

    Attributes:
        name: name of the file.
        split: "train" or "validation".
        domain: domain of the documents.
        documents: number of documents.
        text_bytes: bytes of their text in UTF-8.
        tokens: number of tokens, including end-of-text tokens.
        file_bytes: size of the file in bytes.
    """

    name: str
    split: str
    domain: str
    documents: int
    text_bytes: int
    tokens: int
    file_bytes: int


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Description of a folder of shards.

    Attributes:
        corpus: SHA-256 of all documents and their domains, regardless of order.
        order: SHA-256 of the documents' digests in the order of the shards.
        tokenizer: SHA-256 of the tokenizer's JSON.
        token_bytes: width of a token in the files, 2 or 4 bytes, little-endian.
        validation_fraction: share of the documents held out for validation.
        shards: the shards, in the order of their streams.
    """

    corpus: str
    order: str
    tokenizer: str
    token_bytes: int
    validation_fraction: float
    shards: list[Shard]

    @property
    def digest(self) -> str:
        """Digest of the corpus and of its order."""
        return digest_in_order(self.corpus, self.order)

    def to_json(self) -> str:
        """Returns the content of the index file."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @staticmethod
    def load(folder: Path) -> ShardIndex:
        """Reads the index of a folder, and checks that its shards are complete.

        Raises:
            DataError: if the folder has no index, the index has another format, or a shard is
                missing or cut short.
        """
        try:
            fields = json.loads((folder / INDEX).read_text())
        except FileNotFoundError:
            raise DataError(
                f"{folder} holds no finished shards; run python prepare.py --output={folder} until "
                "it finishes"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / INDEX} cannot be read ({error})") from None
        try:
            if fields.pop("format") != FORMAT:
                raise ValueError
            shards = [Shard(**shard) for shard in fields.pop("shards")]
            index = ShardIndex(**fields, shards=shards)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise DataError(
                f"{folder / INDEX} has another format; make the shards again with prepare.py"
            ) from None
        for shard in index.shards:
            path = folder / shard.name
            if not path.is_file() or path.stat().st_size != shard.file_bytes:
                raise DataError(
                    f"the shard {path} is missing or cut short; run the same prepare.py command "
                    "again to restore it"
                )
        return index


class ShardedTokens:
    """The tokens of several shards as one array, which reads tokens when it is sliced.

    Each process opens a file when it first reads it.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], token_bytes: int):
        self._folder = folder
        self._type = _token_type(token_bytes)
        tokens = np.array([shard.tokens for shard in shards], np.int64)
        records = -(-tokens // RECORD_TOKENS)
        self._ends = np.cumsum(tokens)
        self._starts = self._ends - tokens
        self._first_records = np.cumsum(records) - records
        self._length = int(tokens.sum())
        self._records = open_records([folder / shard.name for shard in shards], records)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Int[np.ndarray, " n"]:
        first, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError("a slice of tokens must have step 1")
        parts = [np.zeros(0, np.int32)]
        while first < stop:
            shard = int(np.searchsorted(self._ends, first, side="right"))
            record, skipped = divmod(first - int(self._starts[shard]), RECORD_TOKENS)
            tokens = self._record(int(self._first_records[shard]) + record)[skipped:]
            parts.append(tokens[: stop - first].astype(np.int32))
            first += len(parts[-1])
        return np.concatenate(parts)

    def _record(self, number: int) -> np.ndarray:
        try:
            return np.frombuffer(self._records[number], self._type)
        except RuntimeError as error:  # a checksum of a record is wrong
            raise DataError(
                f"a shard in {self._folder} is damaged ({error}); delete it and run the same "
                "prepare.py command again to restore it"
            ) from None


def token_bytes_for(vocab_size: int) -> int:
    """Returns the width of a token in a shard, in bytes."""
    return 2 if vocab_size <= 1 << 16 else 4


def write_shard(path: Path, tokens: Iterable[Int[np.ndarray, " _"]], token_bytes: int) -> None:
    """Writes the tokens of a shard. The file appears when all of it is on disk.

    Raises:
        DataError: if the shard cannot be written.
    """
    write_records(path, _as_records(tokens, _token_type(token_bytes)))


def _as_records(tokens: Iterable[Int[np.ndarray, " _"]], kind: np.dtype) -> Iterator[bytes]:
    left = np.zeros(0, np.int32)
    for part in tokens:
        left = np.concatenate([left, part])
        whole = len(left) - len(left) % RECORD_TOKENS
        for record in left[:whole].reshape(-1, RECORD_TOKENS):
            yield record.astype(kind).tobytes()
        left = left[whole:]
    if len(left):
        yield left.astype(kind).tobytes()


def count_tokens(path: Path, token_bytes: int) -> int | None:
    """Returns the number of tokens in a shard, or `None` if it is missing or unreadable."""
    if (found := count_records(path)) is None:
        return None
    count, last = found
    return max(0, count - 1) * RECORD_TOKENS + last // token_bytes


def _token_type(token_bytes: int) -> np.dtype:
    return np.dtype(f"<u{token_bytes}")
