"""A small corpus of one's own, and a way to have its preparation killed.

python -m tests.data.own_text PATTERN OUTPUT EVENT

The process is killed before its EVENT-th record, or rename of a file; it prints how many there
were if it was not.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from peerjax.data import records, shards
from peerjax.data.prepare import Settings, prepare

WORDS = "a shard holds whole documents and every document begins with the same token"
FRACTION = 0.25


def write_own_text(folder: Path) -> str:
    """Text files and JSON lines, with duplicates and texts that spell out the end-of-text token."""
    rng = np.random.default_rng(0)

    def sentences(count: int) -> str:
        return "\n".join(" ".join(rng.choice(WORDS.split(), 12)) for _ in range(count))

    (folder / "web" / "deep").mkdir(parents=True)
    for number in range(12):
        inner = folder / "web" / "deep" if number % 2 else folder / "web"
        (inner / f"{number}.txt").write_text(sentences(1 + number) + " <|endoftext|>\r\n")
    (folder / "web" / "twelve.txt").write_text((folder / "web" / "2.txt").read_text())
    (folder / "web" / "long.txt").write_text(sentences(900))
    lines = [sentences(3 + number % 5) for number in range(30)]
    lines += [lines[3], "  ", sentences(1) + "\r\n é漢"]
    text = "".join(json.dumps({"id": 1, "text": line}) + "\n" for line in lines)
    (folder / "x.jsonl").write_text(text)
    return f"web={folder}/web/**/*.txt;log={folder}/x.jsonl"


def own_settings(pattern: str, **changes: object) -> Settings:
    """Shards of a kilobyte of text."""
    fields = {"pattern": pattern, "validation_fraction": FRACTION, "shard_mb": 0.001, **changes}
    return Settings(**fields)


class KilledWriter(records.ArrayRecordWriter):
    def write(self, record: bytes) -> None:
        count_event()
        super().write(record)


def count_event() -> None:
    global events
    events += 1
    if events == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_replace(self: Path, target: Path) -> Path:
    count_event()
    return replace(self, target)


if __name__ == "__main__":
    events, kill_at, replace = 0, int(sys.argv[3]), Path.replace
    records.ArrayRecordWriter = KilledWriter
    shards.RECORD_TOKENS = 256
    Path.replace = killed_replace
    prepare(own_settings(sys.argv[1]), sys.argv[2])
    print("events", events)
