"""Finds the files of a user's own text by a pattern, and streams the documents in them."""

from __future__ import annotations

import codecs
import glob
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from peerjax.errors import ConfigError, DataError

JSON_LINES = ".jsonl"
UNNAMED = "files"  # the domain of a glob without a name
BLOCK_BYTES = 1 << 20  # bytes of a text file that are read at a time


class TextFile(NamedTuple):
    """A file and the domain of its documents."""

    domain: str
    path: Path


class StoredDocument(NamedTuple):
    """A document in a file.

    Attributes:
        name: path of the file, with the line number for JSON lines.
        offset: first byte of the document in the file.
        length: bytes of the document in the file.
        blocks: parts of the text; they can be read once.
    """

    name: str
    offset: int
    length: int
    blocks: Iterable[str]


def domain_globs(pattern: str) -> list[tuple[str, str]]:
    """Splits a pattern, such as `web=corpus/**/*.txt;notes/*.jsonl`, into domains and globs.

    Raises:
        ConfigError: if there is no glob, or a domain has no glob or the name "all".
    """
    found = []
    for part in filter(None, (part.strip() for part in pattern.split(";"))):
        named = re.fullmatch(r"([\w-]+)=(.*)", part)
        domain, files = (named[1], named[2].strip()) if named else (UNNAMED, part)
        if not files:
            raise ConfigError(f"the domain {domain!r} in the pattern {pattern!r} has no glob")
        if domain == "all":
            raise ConfigError(
                "a domain cannot be called 'all', which means all domains; choose another name"
            )
        found.append((domain, files))
    if not found:
        raise ConfigError(
            f"the pattern {pattern!r} has no glob; give one such as 'corpus/**/*.txt'"
        )
    return found


def find_files(pattern: str, outside: Path | None = None) -> list[TextFile]:
    """Lists the files that a pattern matches, domain by domain, each in the order of paths.

    Args:
        pattern: globs, separated by ";". `**` in a glob matches any folders. "NAME=" before a glob
            gives the domain of its files. A file that several globs match belongs to the first.
        outside: a folder whose files are left out.

    Raises:
        ConfigError: if the pattern has no globs.
        DataError: if no file matches one of the globs.
    """
    by_domain: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for domain, files in domain_globs(pattern):
        matches = [path for path in glob.glob(files, recursive=True) if os.path.isfile(path)]
        if outside is not None:
            folder = os.path.realpath(outside) + os.sep
            matches = [path for path in matches if not os.path.realpath(path).startswith(folder)]
        if not matches:
            raise DataError(f"no file matches {files!r} in the pattern {pattern!r}")
        by_domain.setdefault(domain, []).extend(Path(path) for path in {*matches} - seen)
        seen |= {*matches}
    return [TextFile(domain, path) for domain in by_domain for path in sorted(by_domain[domain])]


def read_blocks(path: Path) -> Iterator[str]:
    """Reads a UTF-8 file in parts, and turns every end of line into a newline.

    Raises:
        DataError: if the file cannot be read or is not UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    done = 0
    try:
        with path.open("rb") as file:
            while True:
                block = file.read(BLOCK_BYTES)
                done += len(block)
                text = decoder.decode(block, final=not block)
                if text:
                    yield text
                if not block:
                    return
    except UnicodeDecodeError as error:
        place = done - len(error.object) + error.start
        raise DataError(
            f"{path} is not UTF-8 text (byte {place} cannot be decoded); convert it or leave it out"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def documents_in(path: Path, text_field: str) -> Iterator[StoredDocument]:
    """Yields the documents of a file: the whole file, or one per line for JSON lines.

    Args:
        path: path of the file.
        text_field: the field of a line's object that holds the text.

    Raises:
        DataError: if the file cannot be read, or a line is bad.
    """
    try:
        if path.suffix != JSON_LINES:
            size = path.stat().st_size
            yield StoredDocument(path.as_posix(), 0, size, read_blocks(path))
            return
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    text = _text_of_line(line, text_field, f"{path}, line {number},")
                    yield StoredDocument(f"{path.as_posix()}:{number}", offset, len(line), (text,))
                offset += len(line)
    except OSError as error:
        raise _unreadable(path, error) from None


def read_document(path: Path, offset: int, length: int, text_field: str) -> Iterable[str]:
    """Reads the text of one document that `documents_in` found, in parts.

    Raises:
        DataError: if the document cannot be read, for example because the file has changed.
    """
    if path.suffix != JSON_LINES:
        return read_blocks(path)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            line = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from None
    return (_text_of_line(line, text_field, f"{path}, byte {offset},"),)


def empty_file(path: Path) -> DataError:
    """Returns the error for a file without text."""
    return DataError(f"{path} is empty; leave it out")


def _text_of_line(line: bytes, text_field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where} is not UTF-8 text; convert the file or leave it out") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); mend it or leave it out") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} is no JSON object with the field {text_field!r}")
    if text_field not in record:
        raise DataError(
            f"{where} has no field {text_field!r} (it has: {', '.join(record) or 'none'}); "
            "name the one that holds the text as text_field"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where} has a field {text_field!r} that is not text: {text!r:.40}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} has half a surrogate pair in its text; mend it") from None
    return text


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read ({error.strerror}); mend that or leave it out")
