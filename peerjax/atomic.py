"""Writes files atomically, and makes, checks and locks folders for them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from peerjax.errors import UserError


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Makes a folder if it does not exist, and checks that it can be written to.

    Call this before any work that could be lost.

    Raises:
        UserError: if the folder cannot be made or written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"{path} cannot be used as an output folder ({error.strerror}); choose another"
        ) from None


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Locks a folder until the context ends, against other processes that call this function.

    The lock is also released when the process ends, for any reason.

    Raises:
        UserError: if another process has locked the folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is using {folder}; wait until it ends, or choose another folder"
            ) from None
        yield
    finally:
        os.close(handle)


def write_atomically(path: epath.Path | Path, text: str) -> None:
    """Writes a file so that it is either the old one or the complete new one, even if killed."""
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def replace_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path, and renames the file when it is complete.

    The file gets the default file mode. Some libraries create files that only the owner can read.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        write(unfinished)
        unfinished.chmod(mode)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
