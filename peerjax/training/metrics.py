"""Metrics of a run: `metrics.jsonl`, TensorBoard events and terminal output."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping

import rich.console
import rich.progress
from etils import epath
from tensorboardX import SummaryWriter

from peerjax.atomic import write_atomically
from peerjax.errors import UserError
from peerjax.processes import is_first

FILE, EVENTS = "metrics.jsonl", "tensorboard"


class MetricsWriter:
    """Writes one line a step to `metrics.jsonl`, and the same metrics to TensorBoard.

    Of several processes, only the first writes.

    Nothing in the file depends on the clock. A run that was killed and continued writes the same
    bytes as one that was not killed.

    Args:
        workdir: the run's folder.
        first_step: the first step that will be written. Old lines from this step on are deleted. A
            run that was killed after its last checkpoint has such lines.
    """

    def __init__(self, workdir: epath.Path, first_step: int):
        self._path = workdir / FILE
        self._events: SummaryWriter | None = None
        if not is_first():
            return
        kept = [line for line in read_metrics(workdir) if line["step"] < first_step]
        write_atomically(self._path, "".join(map(_as_line, kept)))
        self._events = SummaryWriter(str(workdir / EVENTS), purge_step=first_step)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the line of a step immediately.

        Non-finite metrics, such as the loss of a skipped step, are left out, because JSON has no
        such numbers.

        Raises:
            UserError: if the file cannot be written.
        """
        if not is_first():
            return
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        try:
            with self._path.open("a") as file:
                file.write(_as_line({"step": step, **figures}))
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error}); fix the cause and run the same "
                "command again to continue from the last checkpoint"
            ) from None
        self.write_events(step, figures)

    def write_events(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes metrics to TensorBoard only. Use it for metrics that depend on the clock."""
        if self._events is None:
            return
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._events is not None:
            self._events.close()


def read_metrics(workdir: epath.Path) -> list[dict[str, float | int]]:
    """Returns the lines of `metrics.jsonl`, without an incomplete last line."""
    path = workdir / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _as_line(record: Mapping[str, float | int]) -> str:
    return json.dumps(record) + "\n"


class Progress:
    """A progress bar on a terminal, and plain lines elsewhere. Only one process prints.

    Args:
        total: the last step.
        step: the step from which the run continues.
        tokens_per_step: tokens in a step over all devices.
        line_every: steps between plain lines.
    """

    def __init__(self, total: int, step: int, tokens_per_step: int, line_every: int):
        self._total, self._first, self._tokens = total, step, tokens_per_step
        self._line_every = line_every
        self._start: float | None = None
        self.tokens_per_second = 0.0  # without the first step of this process, which compiles
        self._bar: rich.progress.Progress | None = None
        self._quiet = not is_first()
        if not self._quiet and sys.stdout.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.fields[figures]}"),
                rich.progress.TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=total, completed=step, figures="compiling")
            self._bar.start()

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Shows the metrics of a finished step."""
        now = time.monotonic()
        if self._start is None:
            self._start, self._first = now, step
        else:
            self.tokens_per_second = (step - self._first) * self._tokens / (now - self._start)
        speed = self.tokens_per_second
        shares = [value for name, value in figures.items() if name.startswith("experts_hit/")]
        text = f"loss {figures['loss']:.4f}  {speed:,.0f} tokens/s"
        if shares:
            text += f"  experts hit {sum(shares) / len(shares):.1%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
        elif not self._quiet and (step % self._line_every == 0 or step == self._total):
            left = (self._total - step) * self._tokens / speed if speed else 0.0
            minutes, seconds = divmod(round(left), 60)
            print(f"step {step}/{self._total}  {text}  left {minutes}:{seconds:02d}", flush=True)

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
