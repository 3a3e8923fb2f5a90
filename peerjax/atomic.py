"""Files that are never seen half written, and folders for them: tried beforehand, and locked."""

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
    """Makes a folder, if it is not there, and tries to write to it: before there is work to lose.

    Raises:
        UserError: if that cannot be done.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"{path} cannot be a folder to write to ({error.strerror}); name another"
        ) from None


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other processes that ask for it out of a folder until the context ends.

    The lock also ends with the process, however it ends.

    Raises:
        UserError: if another one is in it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is at work in {folder}; let it finish, or name another folder"
            ) from None
        yield
    finally:
        os.close(handle)


def write_atomically(path: epath.Path | Path, text: str) -> None:
    """Writes a file that is either the old one or the whole new one, even if killed."""
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def replace_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file under another name, and renames it when it is whole.

    It can be read by whom any new file can: some libraries make theirs for their user alone.
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
