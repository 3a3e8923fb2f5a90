"""Files that are never seen half written, and folders for them that are tried beforehand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
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
