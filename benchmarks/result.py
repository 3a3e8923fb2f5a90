"""The report of a benchmark: a table, figures with their targets, and one JSON object."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import rich.box
import rich.console
import rich.table

REPOSITORY = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "results"


class Figure(NamedTuple):
    """One number. `ok` is whether it reaches its target, or `None` if it has no target."""

    name: str
    value: float
    target: str | None = None
    ok: bool | None = None

    @staticmethod
    def at_most(name: str, value: float, bound: float) -> "Figure":
        """A figure that should not exceed a bound."""
        return Figure(name, value, f"<= {bound:g}", value <= bound)

    @staticmethod
    def at_least(name: str, value: float, bound: float) -> "Figure":
        """A figure that should reach a bound."""
        return Figure(name, value, f">= {bound:g}", value >= bound)


class Result(NamedTuple):
    """The results of one benchmark.

    Attributes:
        columns: names of the columns of the table.
        rows: rows of the table, as text.
        figures: numbers to compare with targets.
        details: everything that was measured, for the file.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Sequence[Figure]
    details: Mapping[str, Any]


def publish(name: str, result: Result, quick: bool) -> None:
    """Prints a result, with JSON as the last line, and writes it to `benchmarks/results/`.

    The result of `--quick` has its own file, which git ignores.
    """
    console = rich.console.Console(highlight=False, soft_wrap=True, width=120)
    table = rich.table.Table(title=name, box=rich.box.SIMPLE, title_justify="left")
    for index, column in enumerate(result.columns):
        table.add_column(column, justify="right" if index else "left")
    for row in result.rows:
        table.add_row(*row)
    console.print(table)
    for figure in result.figures:
        mark = {True: "reached", False: "MISSED", None: ""}[figure.ok]
        console.print(f"{figure.name}: {figure.value:.4g}  {figure.target or ''}  {mark}")
    record = {
        "benchmark": name,
        "figures": [figure._asdict() for figure in result.figures],
        "commit": commit(),
        "device": device(),
        "details": dict(result.details),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / (f"{name}.quick.json" if quick else f"{name}.json")
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def published(name: str) -> Mapping[str, Any]:
    """Returns the details of the last result of a benchmark.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = FOLDER / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m benchmarks {name}` first")
    return json.loads(path.read_text())["details"]


def commit() -> str:
    """Returns the commit that is checked out, with a mark if files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device() -> str:
    """Returns the name of the device that this process computes on."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return f"{jax.device_count()} x {first.device_kind}"
    return f"{os.cpu_count()} cores, {_cpu_model()}"


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
