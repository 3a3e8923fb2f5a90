"""Measures prepare.py on a gigabyte of text: peak memory of the process tree, and speed.

The text is the default text, repeated. A number in every document makes it different from its
copies. Half of the text is JSON lines, the other half is a single text file.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.result import REPOSITORY, Figure, Result
from peerjax.data.packages import DEFAULT_DOMAINS, read_packages
from peerjax.data.shards import ShardIndex

BOUND_MB = 600  # bound on memory, for any size of text
POLL_SECONDS = 0.05


def run(quick: bool) -> Result:
    """Prepares a little text with and without worker processes, and then ten times as much."""
    little, much = (20_000_000,) * 2 if quick else (100_000_000, 1_000_000_000)
    arms = []
    for size, workers in ((little, 0), (little, 2), (much, 2)):
        with tempfile.TemporaryDirectory() as place:
            pattern = write_text(Path(place), size)
            arms.append({"workers": workers, **prepare(Path(place), pattern, workers)})
    rows = [
        [
            f"{arm['text_bytes'] / 1e6:,.0f} MB of text, {arm['workers'] or 'no'} workers",
            f"{arm['seconds']:.0f}",
            f"{arm['text_bytes'] / 1e6 / arm['seconds']:.2f}",
            f"{arm['text_bytes'] / 1e6 / arm['cpu_seconds']:.2f}",
            f"{arm['peak_bytes'] / 1e6:.0f}",
        ]
        for arm in arms
    ]
    peak = max(arm["peak_bytes"] for arm in arms) / 1e6
    text, last = arms[-1]["text_bytes"] / 1e6, arms[-1]
    return Result(
        ("", "seconds", "MB/s", "MB a CPU second", "peak MB of all processes"),
        rows,
        [
            Figure.at_most("peak MB of all processes", peak, BOUND_MB),
            Figure("MB/s", text / last["seconds"]),
            Figure("MB a CPU second", text / last["cpu_seconds"]),
        ],
        {"arms": arms},
    )


def write_text(folder: Path, size: int) -> str:
    """Writes JSON lines and one large text file; returns the pattern that finds them."""
    texts = [document.text for document in read_packages(DEFAULT_DOMAINS)]

    def numbered() -> Iterator[str]:
        for number, text in enumerate(itertools.cycle(texts)):
            yield f"Document {number}.\n{text}\n"

    documents = numbered()
    for name, as_line in (("many.jsonl", True), ("one.txt", False)):
        with (folder / name).open("w", encoding="utf-8") as file:
            written = 0
            while written < size // 2:
                text = next(documents)
                written += len(text.encode())
                file.write(json.dumps({"text": text}) + "\n" if as_line else text)
    return f"{folder}/many.jsonl;{folder}/one.txt"


def prepare(folder: Path, pattern: str, workers: int) -> dict[str, Any]:
    """Prepares shards in other processes, and measures these."""
    output = folder / f"shards{workers}"
    command = [
        sys.executable,
        "prepare.py",
        f"--pattern={pattern}",
        f"--output={output}",
        f"--workers={workers}",
    ]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    peak, ended = 0, 0
    while not ended:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(POLL_SECONDS)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"prepare.py ended with status {process.returncode}")
    index = ShardIndex.load(output)
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,  # sum over all its processes
        "peak_bytes": peak,
        "text_bytes": sum(shard.text_bytes for shard in index.shards),
        "tokens": sum(shard.tokens for shard in index.shards),
        "documents": sum(shard.documents for shard in index.shards),
    }


def resident_bytes(pid: int) -> int:
    """Returns the memory of a process and its descendants. Shared memory counts for each."""
    process = Path(f"/proc/{pid}")
    try:
        pages = int((process / "statm").read_text().split()[1])
        children = [each.read_text().split() for each in process.glob("task/*/children")]
    except (OSError, IndexError):
        return 0
    own = pages * os.sysconf("SC_PAGE_SIZE")
    return own + sum(resident_bytes(int(child)) for child in itertools.chain(*children))
