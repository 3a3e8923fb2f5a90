"""Files that are never seen half written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath


def write_atomically(path: epath.Path | Path, text: str) -> None:
    """Writes a file that is either the old one or the whole new one, even if killed."""
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def replace_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file under another name, and renames it when it is whole."""
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        write(unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
