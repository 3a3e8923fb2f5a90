"""Makes shards of tokens from a user's own text, in bounded memory, and resumes if interrupted.

All text is read twice. The first pass plans which document goes into which shard. The second pass
makes the shards one by one. Each shard is written under a temporary name and renamed when it is
complete. A shard under its final name is therefore complete, and resuming needs no other record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from peerjax.atomic import alone_in, make_folder, write_atomically
from peerjax.data.meter import Meter
from peerjax.data.plan import Documents, Plan, check_splits, make_plan, read_planned, scan
from peerjax.data.shards import (
    INDEX,
    TOKENIZER,
    Shard,
    ShardIndex,
    count_tokens,
    token_bytes_for,
    write_shard,
)
from peerjax.data.text_files import TextFile, find_files
from peerjax.data.tokenizer import Tokenizer
from peerjax.errors import ConfigError, DataError

PLAN = "plan.json"
LARGEST_SHARD = 1e18  # bytes; a shard of this size is never full
# Limits of a task that scans files: number of files, and bytes.
SCAN_FILES, SCAN_BYTES = 512, 1 << 24
POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that affect shards. Each field is a flag of `prepare.py`.

    Attributes:
        pattern: globs of the text files, as in `find_files`.
        tokenizer: path of a tokenizer JSON; empty for the one that comes with peerjax.
        text_field: field of JSON lines that holds the text.
        validation_fraction: share of the documents held out for validation.
        shard_mb: megabytes (10^6 bytes) of text in a shard.
        skip_bad_files: whether to skip files that cannot be used, instead of stopping.
    """

    pattern: str
    tokenizer: str = ""
    text_field: str = "text"
    validation_fraction: float = 0.05
    shard_mb: float = 64.0
    skip_bad_files: bool = False


def prepare(settings: Settings, output: str, workers: int = 0) -> None:
    """Makes the shards of a corpus in a folder, or those that are still missing.

    Args:
        settings: the settings of the shards.
        output: the output folder. `prepare` writes the shards, `tokenizer.json` and `plan.json`
            to it, and `index.json` at the end.
        workers: number of worker processes. With 0, this process does the work, with the
            tokenizer's threads.

    Raises:
        ConfigError: if a setting is out of range.
        DataError: if text or tokenizer cannot be used, or the folder has other contents.
        UserError: if the folder cannot be made or written to, or another process uses it.
    """
    if not 0 < settings.validation_fraction < 1:
        raise ConfigError(f"validation_fraction={settings.validation_fraction} is not in (0, 1)")
    if not 0.5 < settings.shard_mb * 1e6 < LARGEST_SHARD:  # half a byte rounds to 0
        raise ConfigError(
            f"shard_mb={settings.shard_mb} is not between one byte (0.000001) and "
            f"{LARGEST_SHARD / 1e6:g}; give megabytes, such as 64"
        )
    if workers < 0:
        raise ConfigError(f"workers={workers} is negative")
    folder, start = Path(output), time.monotonic()
    tokenizer = Tokenizer.load(settings.tokenizer)
    recorded = {**dataclasses.asdict(settings), "tokenizer": tokenizer.digest}
    files = find_files(settings.pattern, outside=folder)
    with contextlib.ExitStack() as stack:
        make_folder(folder)
        stack.enter_context(alone_in(folder))
        known = _known_plan(folder, recorded)
        meter = stack.enter_context(Meter())
        counter = multiprocessing.get_context("spawn").Value("q")
        executor = stack.enter_context(_executor(workers, tokenizer.json, counter))

        # ---- The plan ----
        plan = _plan(executor, files, settings, meter, counter, window=workers + 1)
        described = {"settings": recorded, **plan.to_json()}
        if known is not None and known != described:
            raise DataError(
                f"the text that {settings.pattern!r} matches has changed since the shards in "
                f"{folder} were begun; choose another --output or restore the old text"
            )
        for line in plan.skipped:
            meter.say(f"skipped: {line}")
        check_splits(plan)
        write_atomically(folder / PLAN, json.dumps(described, indent=1) + "\n")
        write_atomically(folder / TOKENIZER, tokenizer.json)
        for leftover in folder.glob(".*.array_record.*.tmp"):
            leftover.unlink(missing_ok=True)

        # ---- The missing shards ----
        token_bytes = token_bytes_for(tokenizer.vocab_size)
        tokens = {
            shard.name: count_tokens(folder / shard.name, token_bytes) for shard in plan.shards
        }
        missing = [shard for shard in plan.shards if tokens[shard.name] is None]
        tasks = (
            (str(folder / shard.name), *_part(plan, shard.first, shard.stop), settings.text_field)
            for shard in missing
        )
        made_bytes = sum(shard.text_bytes for shard in missing)
        kept = len(plan.shards) - len(missing)
        if missing and kept:
            meter.say(f"resuming: {kept} of {len(plan.shards)} shards are complete")
        meter.begin("tokenizing", made_bytes)
        shown = _Shown(meter, counter)
        for number, count in _run(executor, _make_shard, tasks, workers + 1, shown.show):
            tokens[missing[number].name] = count
        meter.end()
        index = _index(folder, plan, settings, tokenizer.digest, token_bytes, tokens)
        write_atomically(folder / INDEX, index.to_json())
    _close(index, folder, made_bytes, time.monotonic() - start)


def _close(index: ShardIndex, folder: Path, made_bytes: int, seconds: float) -> None:
    tokens = sum(shard.tokens for shard in index.shards)
    text = sum(shard.text_bytes for shard in index.shards)
    speed = f"{made_bytes / 1e6 / seconds:.1f} MB/s" if made_bytes else "already complete"
    print(
        f"{folder}: {tokens:,} tokens from {text:,} bytes of text in {len(index.shards)} shards; "
        f"{speed}"
    )


# ---- The folder ----


def _known_plan(folder: Path, recorded: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the content of `plan.json`, or `None` if the folder is empty.

    Raises:
        DataError: if the folder was begun with other settings or has other contents.
    """
    path = folder / PLAN
    if not path.exists():
        if any(not name.startswith(".") for name in os.listdir(folder)):
            raise DataError(f"{folder} is not empty and holds no shards; choose another --output")
        return None
    known = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{name} (was {known['settings'].get(name)!r}, is {value!r})"
        for name, value in recorded.items()
        if known["settings"].get(name) != value
    ]
    if changed:
        raise DataError(
            f"{folder} was begun with other settings: {'; '.join(changed)}; "
            "choose another --output or restore the old values"
        )
    return known


def _index(
    folder: Path,
    plan: Plan,
    settings: Settings,
    tokenizer: str,
    token_bytes: int,
    tokens: dict[str, int | None],
) -> ShardIndex:
    shards = [
        Shard(
            name=shard.name,
            split=shard.split,
            domain=shard.domain,
            documents=shard.stop - shard.first,
            text_bytes=shard.text_bytes,
            tokens=tokens[shard.name] or 0,
            file_bytes=(folder / shard.name).stat().st_size,
        )
        for shard in plan.shards
    ]
    return ShardIndex(
        corpus=plan.corpus,
        order=plan.order,
        tokenizer=tokenizer,
        token_bytes=token_bytes,
        validation_fraction=settings.validation_fraction,
        shards=shards,
    )


# ---- Tasks and workers ----


class _Worker:
    """State of a worker, set once: a tokenizer, and a count of bytes that all workers share."""

    tokenizer: Tokenizer
    counter: Any

    @staticmethod
    def start(json: str, counter: Any) -> None:
        _Worker.tokenizer, _Worker.counter = Tokenizer(json), counter

    @staticmethod
    def start_process(json: str, counter: Any, threads: int) -> None:
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # for the tokenizer
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
        threading.Thread(target=_die_with_parent, daemon=True).start()
        _Worker.start(json, counter)

    @staticmethod
    def count(size: int) -> None:
        with _Worker.counter.get_lock():
            _Worker.counter.value += size


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _scan(
    numbered: list[tuple[int, TextFile]], text_field: str
) -> tuple[Documents, list[tuple[int, str]]]:
    return scan(numbered, text_field, _Worker.count)


def _make_shard(path: str, files: list[TextFile], documents: Documents, text_field: str) -> int:
    tokens = 0
    tokenizer = _Worker.tokenizer

    def counted() -> Iterator[Any]:
        nonlocal tokens
        texts = read_planned(files, documents, text_field, _Worker.count)
        for part in tokenizer.encode(texts):
            tokens += len(part)
            yield part

    write_shard(Path(path), counted(), token_bytes_for(tokenizer.vocab_size))
    return tokens


def _executor(workers: int, json: str, counter: Any) -> Executor:
    if not workers:
        return ThreadPoolExecutor(1, initializer=_Worker.start, initargs=(json, counter))
    threads = max(1, (os.cpu_count() or 1) // workers)
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_Worker.start_process,
        initargs=(json, counter, threads),
    )


class _Shown:
    """Shows on a meter the bytes that workers have counted since this object was made."""

    def __init__(self, meter: Meter, counter: Any):
        self._meter, self._counter, self._first = meter, counter, counter.value

    def show(self) -> None:
        self._meter.update(self._counter.value - self._first)


def _run(
    executor: Executor,
    function: Callable[..., Any],
    tasks: Iterable[tuple[Any, ...]],
    window: int,
    show: Callable[[], None],
) -> Iterator[tuple[int, Any]]:
    """Executes tasks, at most `window` at a time, and yields their numbers and results."""
    waiting: dict[Future[Any], int] = {}
    numbered = enumerate(tasks)
    try:
        while True:
            while len(waiting) < window and (task := next(numbered, None)) is not None:
                waiting[executor.submit(function, *task[1])] = task[0]
            if not waiting:
                return
            for future in wait(waiting, POLL_SECONDS, FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
            show()
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps because memory ran out; run the same command "
            "again with fewer --workers to resume"
        ) from None
    finally:
        for future in waiting:
            future.cancel()


def _plan(
    executor: Executor,
    files: list[TextFile],
    settings: Settings,
    meter: Meter,
    counter: Any,
    window: int,
) -> Plan:
    sizes = [_size(file.path) for file in files]
    meter.begin("reading", sum(sizes))
    shown = _Shown(meter, counter)
    tasks = ((part, settings.text_field) for part in _scan_parts(files, sizes))
    results = dict(_run(executor, _scan, tasks, window, shown.show))
    meter.end()
    in_order = [results[number] for number in sorted(results)]
    faults = [fault for _, of_part in in_order for _, fault in of_part]
    if faults and not settings.skip_bad_files:
        more = f" (and {len(faults) - 1} more such files)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}; --skip_bad_files skips all such files")
    return make_plan(
        files,
        [documents for documents, _ in in_order],
        faults,
        validation_fraction=settings.validation_fraction,
        shard_bytes=round(settings.shard_mb * 1e6),
    )


def _scan_parts(files: list[TextFile], sizes: list[int]) -> Iterator[list[tuple[int, TextFile]]]:
    part: list[tuple[int, TextFile]] = []
    total = 0
    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        part.append((number, file))
        total += size
        if len(part) == SCAN_FILES or total >= SCAN_BYTES:
            yield part
            part, total = [], 0
    if part:
        yield part


def _part(plan: Plan, first: int, stop: int) -> tuple[list[TextFile], Documents]:
    """Returns some documents of a plan with only their own files, to be sent to a worker."""
    documents = plan.documents.at(slice(first, stop))
    own, renumbered = np.unique(documents.files, return_inverse=True)
    return [plan.files[number] for number in own], documents._replace(files=renumbered)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # the scan reports the error
