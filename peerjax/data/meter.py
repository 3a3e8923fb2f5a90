"""Shows the progress of work in bytes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

import rich.progress

LINE_SECONDS = 10.0  # time between plain lines


class Meter:
    """Shows the progress of consecutive stages, in megabytes and megabytes per second."""

    def __init__(self) -> None:
        self._bar: rich.progress.Progress | None = None
        if sys.stdout.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.DownloadColumn(),
                rich.progress.TransferSpeedColumn(),
                rich.progress.TimeRemainingColumn(),
            )
            self._bar.start()

    def begin(self, stage: str, total: int) -> None:
        """Starts a stage of `total` bytes."""
        self._stage, self._total, self._done = stage, total, 0
        self._start = self._shown = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(stage, total=total)

    def update(self, done: int) -> None:
        """Sets the number of bytes of the stage that are done."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif time.monotonic() - self._shown >= LINE_SECONDS:
            self._line()

    def end(self) -> None:
        """Ends the stage."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._total)
        elif self._shown > self._start:  # lines were printed, so print a last one
            self._done = self._total
            self._line()

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, soft_wrap=True, markup=False)
        else:
            print(text, flush=True)

    def _line(self) -> None:
        self._shown = time.monotonic()
        speed = self._done / 1e6 / (self._shown - self._start)
        print(
            f"{self._stage}  {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB  "
            f"{speed:,.1f} MB/s",
            flush=True,
        )

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
