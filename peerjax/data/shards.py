"""Tokens of a prepared corpus in files: how they are written, and how training reads them.

A shard is an ArrayRecord file: the tokens of whole documents end to end, cut into records of
equal length. Shards of one split and domain are one stream of tokens, one after the other.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Int

from peerjax.data.documents import digest_in_order
from peerjax.errors import DataError

INDEX, TOKENIZER = "index.json", "tokenizer.json"
FORMAT = 1
RECORD_TOKENS = 4096
# One record a chunk, as random access wants it; zstd would save an eighth of the bytes.
WRITER_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of tokens.

    Attributes:
        name: of the file.
        split: "train" or "validation".
        domain: of its documents.
        documents: how many there are.
        text_bytes: of their text, in UTF-8.
        tokens: how many, end-of-text tokens included.
        file_bytes: size of the file.
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
    """What a folder of shards says about itself.

    Attributes:
        corpus: SHA-256 of all documents and their domains, whatever their order.
        order: SHA-256 of the documents in the order in which they stand.
        tokenizer: SHA-256 of the tokenizer's JSON.
        token_bytes: width of a token in the files, 2 or 4 bytes, little-endian.
        validation_fraction: share of the documents that validation was given.
        shards: in the order of their streams.
    """

    corpus: str
    order: str
    tokenizer: str
    token_bytes: int
    validation_fraction: float
    shards: list[Shard]

    @property
    def digest(self) -> str:
        """Of the corpus with its order."""
        return digest_in_order(self.corpus, self.order)

    def to_json(self) -> str:
        """The content of the index file."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @staticmethod
    def load(folder: Path) -> ShardIndex:
        """Reads the index of a folder, and looks whether its shards are there.

        Raises:
            DataError: if the folder has no index, or one of another format, or a shard is missing
                or cut short.
        """
        try:
            fields = json.loads((folder / INDEX).read_text())
        except FileNotFoundError:
            raise DataError(
                f"{folder} holds no finished shards; run python prepare.py --output={folder} to "
                "its end"
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
                f"{folder / INDEX} is of another format; prepare the shards anew"
            ) from None
        for shard in index.shards:
            path = folder / shard.name
            if not path.is_file() or path.stat().st_size != shard.file_bytes:
                raise DataError(
                    f"the shard {path} is missing or cut short; the prepare.py command that made "
                    "it makes it again"
                )
        return index


@dataclasses.dataclass(frozen=True)
class _WholeFile:
    """What `ArrayRecordDataSource` wants to know, so that it need not open every file."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


class ShardedTokens:
    """The tokens of some shards as one array that is sliced, and read as it is.

    Files are opened when they are first read, in whatever process that is.
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
        files = [
            _WholeFile(str(folder / shard.name), int(count))
            for shard, count in zip(shards, records, strict=True)
        ]
        self._records = ArrayRecordDataSource(files) if files else []

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Int[np.ndarray, " n"]:
        first, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError("tokens are read one after the other")
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
        except RuntimeError as error:  # checksums of the records
            raise DataError(
                f"a shard in {self._folder} is damaged ({error}); delete it, and the prepare.py "
                "command that made it makes it again"
            ) from None


def token_bytes_for(vocab_size: int) -> int:
    """The width of a token in a shard, in bytes."""
    return 2 if vocab_size <= 1 << 16 else 4


def write_shard(path: Path, tokens: Iterable[Int[np.ndarray, " _"]], token_bytes: int) -> None:
    """Writes tokens under a temporary name, and moves them to `path` when all is on disk.

    Raises:
        DataError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        kind, left = _token_type(token_bytes), np.zeros(0, np.int32)
        for part in tokens:
            left = np.concatenate([left, part])
            whole = len(left) - len(left) % RECORD_TOKENS
            for record in left[:whole].reshape(-1, RECORD_TOKENS):
                writer.write(record.astype(kind).tobytes())
            left = left[whole:]
        if len(left):
            writer.write(left.astype(kind).tobytes())
        writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the shard {path} could not be written ({error}); mend the cause and run the same "
            "command again to go on"
        ) from None


def count_tokens(path: Path, token_bytes: int) -> int | None:
    """How many tokens a shard's file has; `None` if it is missing or cannot be read."""
    if not path.is_file():
        return None
    try:
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
        count = reader.num_records()
        last = len(reader.read([count - 1])[0]) if count else 0
        reader.close()
    except RuntimeError:
        return None
    return max(0, count - 1) * RECORD_TOKENS + last // token_bytes


def _token_type(token_bytes: int) -> np.dtype:
    return np.dtype(f"<u{token_bytes}")
