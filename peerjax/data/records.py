"""ArrayRecord files, which are either complete or absent."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from peerjax.errors import DataError

# One record per chunk, for random access. Compression by zstd would save an eighth of the bytes.
WRITER_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"


@dataclasses.dataclass(frozen=True)
class _WholeFile:
    """File information for `ArrayRecordDataSource`, with which it need not open every file."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """Writes records to a temporary file, and renames it to `path` when all of it is on disk.

    Raises:
        DataError: if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the shard {path} could not be written ({error}); fix the cause and run the same "
            "command again to resume"
        ) from None


def open_records(paths: Sequence[Path], counts: Iterable[int]) -> Sequence[bytes]:
    """Returns the records of several files as one sequence. Each process opens files as needed.

    Args:
        paths: the files.
        counts: number of records of each file.
    """
    files = [_WholeFile(str(path), int(n)) for path, n in zip(paths, counts, strict=True)]
    return ArrayRecordDataSource(files) if files else []


def count_records(path: Path) -> tuple[int, int] | None:
    """Returns the number of records in a file, and the bytes of the last one.

    The result is `None` if the file is missing or unreadable.
    """
    if not path.is_file():
        return None
    try:
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
        count = reader.num_records()
        last = len(reader.read([count - 1])[0]) if count else 0
        reader.close()
    except RuntimeError:
        return None
    return count, last
