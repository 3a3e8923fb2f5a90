"""Measures time and memory of a few steps of train.py, in another process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.protocol import OF_POOLS, SHARED
from benchmarks.result import REPOSITORY


def train(
    recipe: str,
    steps: int,
    settings: Mapping[str, Any] | None = None,
    inspect: Callable[[str], Any] = lambda workdir: None,
    repository: Path = REPOSITORY,
) -> dict[str, Any]:
    """Trains, and measures time and memory.

    Args:
        recipe: the name of a file in `configs/`.
        steps: number of steps. Their time does not include checkpoints and evaluation.
        settings: fields that differ from the recipe.
        inspect: called with the workdir, which is deleted afterwards.
        repository: folder of the code that trains.

    Returns:
        "peak_bytes" of the process, "seconds_per_step", and the result of `inspect` as "found".
    """
    fields = {**(settings or {}), "steps": steps, "checkpoint.every": steps, "eval.every": steps}
    with tempfile.TemporaryDirectory() as workdir:
        process = subprocess.Popen(
            [
                sys.executable,
                "train.py",
                f"--config=configs/{recipe}.py",
                f"--workdir={workdir}",
                *(f"--config.{field}={value}" for field, value in fields.items()),
            ],
            cwd=repository,
            env={**os.environ, "PYTHONPATH": str(repository)},
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"train.py with {recipe} ended with status {process.returncode}")
        report = json.loads((Path(workdir) / "report.json").read_text())
        found = inspect(workdir)
    seconds = report["tokens_per_step"] / report["tokens_per_second"]
    return {
        "peak_bytes": usage.ru_maxrss * 1024,
        "seconds_per_step": seconds,
        "found": found,
    }


def seconds_in_turns(
    recipe: str, arms: Mapping[Any, Mapping[str, Any]], steps: int, rounds: int
) -> dict[Any, list[float]]:
    """Returns the mean seconds of a step of each arm in every round. Arms take turns.

    Learning rates are low, because one that warms up over few steps might diverge.

    Args:
        recipe: the name of a file in `configs/`.
        arms: settings of each arm, by any key.
        steps: number of steps in a round.
        rounds: number of rounds.
    """
    more = {SHARED: 1e-4, OF_POOLS: 1e-4, "eval.rows": 8}
    found: dict[Any, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, settings in arms.items():
            found[arm].append(train(recipe, steps, {**settings, **more})["seconds_per_step"])
    return found
