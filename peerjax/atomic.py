"""Files that are never seen half written."""

from __future__ import annotations

from pathlib import Path

from etils import epath


def write_atomically(path: epath.Path | Path, text: str) -> None:
    """Writes a file that is either the old one or the whole new one, even if killed."""
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
