"""Training runs as a queue that can be stopped and taken up again.

A run is a recipe and settings of its fields, in a folder named after them: one that has finished is
not repeated, one that was killed goes on from its last checkpoint.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from benchmarks.result import REPOSITORY

ROOT = REPOSITORY / "runs" / "benchmarks"
Settings = dict[str, Any]


class Interval(NamedTuple):
    """Mean of paired differences over seeds, and half the width of its 95% interval."""

    mean: float
    half_width: float


def validation_loss(recipe: str, settings: Settings) -> float:
    """Trains, or looks up what an earlier call found; infinite for a run that diverged.

    Args:
        recipe: the name of a file in `configs/`.
        settings: fields that differ from it, such as `{"pool.learning_rate": 1e-2}`.

    Returns:
        Nats per token over all validation text, after the last step.
    """
    name = ",".join(f"{field}={value}" for field, value in sorted(settings.items()))
    folder = ROOT / recipe / name
    report, failure = folder / "report.json", folder / "failure.txt"
    if failure.exists():
        return math.inf
    if not report.exists():
        _train(recipe, settings, folder, failure)
        if failure.exists():
            return math.inf
        shutil.rmtree(folder / "checkpoints")
    return json.loads(report.read_text())["validation"]["all"]["nats_per_token"]["after"]


def _train(recipe: str, settings: Settings, folder: Path, failure: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"--config.{field}={value}" for field, value in settings.items()]
    script = ["train.py", f"--config=configs/{recipe}.py", f"--workdir={folder}"]
    with (folder / "output.txt").open("a") as output:
        command = [sys.executable, *script, *overrides]
        process = subprocess.run(
            command, cwd=REPOSITORY, stdout=output, stderr=subprocess.PIPE, text=True, check=False
        )
    if process.returncode == 0:
        return
    if "lower the learning rates" not in process.stderr:
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stderr}")
    failure.write_text(process.stderr)


def rung(value: float, steps: int) -> float:
    """Climbs the ladder ..., 1e-3, 3e-3, 1e-2, 3e-2, ... from one of its values."""
    exponent = round(2 * math.log10(value)) + steps
    return float(f"{3 if exponent % 2 else 1}e{exponent // 2}")


def tune(
    loss_of: Callable[[float], float], start: float
) -> tuple[float, list[tuple[float, float]]]:
    """Finds the best value on the ladder: three values, extended while the best is at an edge.

    Returns:
        The best value, and every (value, loss) that was tried, ascending.
    """
    tried = {rung(start, steps): loss_of(rung(start, steps)) for steps in (-1, 0, 1)}
    while True:
        best = min(tried, key=tried.__getitem__)
        if best == min(tried):
            value = rung(best, -1)
        elif best == max(tried):
            value = rung(best, 1)
        else:
            return best, sorted(tried.items())
        tried[value] = loss_of(value)


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """`first - second`, seed by seed."""
    differences = np.subtract(first, second)
    quantile = scipy.stats.t.ppf(0.975, len(differences) - 1)
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return Interval(float(differences.mean()), float(quantile * error))
