"""Trains a queue of runs, which can be stopped and resumed.

A run is a recipe and settings of its fields. Its result is a line of
`benchmarks/results/runs.jsonl`, which is kept with the code. Another machine can thus continue the
queue. A killed run continues from its last checkpoint. Every run has its own core, and there are as
many runs at once as cores. Compiled programs are kept for the next run.
"""

import fcntl
import hashlib
import json
import math
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats

from benchmarks.result import FOLDER, REPOSITORY, Figure, commit, device
from peerjax.errors import DivergenceError

ROOT = REPOSITORY / "runs" / "benchmarks"
COMPILED = ROOT / "compiled"
LEDGER = FOLDER / "runs.jsonl"
BACKENDS = ("cpu", "gpu", "tpu")
OPTIONAL = ("series", "more")  # left out of the ledger where they are empty
Settings = dict[str, Any]


class Teacher(NamedTuple):
    """The run that a student learns from."""

    recipe: str
    settings: Settings


# Several runs share a GPU. JAX would otherwise reserve its memory for the first run.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
_free_cores: queue.Queue[int | None] = queue.Queue()
for _core in CORES:
    _free_cores.put(_core)


class Interval(NamedTuple):
    """Mean of paired differences over seeds, and half the width of its 95% interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} +- {self.half_width:.4f}"

    def figures(self, name: str, bound: float | None = None) -> list[Figure]:
        """Returns the mean, with an upper bound if one is given, and half the width."""
        mean = Figure(name, self.mean) if bound is None else Figure.at_most(name, self.mean, bound)
        return [mean, Figure("half width of its 95% interval", self.half_width)]


class Run(NamedTuple):
    """The results of a training run.

    Attributes:
        nats_per_token: loss over all validation text after the last step; infinite if it diverged.
        experts: usage and unevenness of each layer's experts.
        seconds: time from the last start to the end, including checkpoints and evaluation.
        commit: commit of the code that trained it.
        device: device that trained it.
        series: all figures of each evaluation, if `train` was called with `keep_series`.
        more: what `inspect` found, if `train` was called with it.
    """

    nats_per_token: float
    experts: dict[str, Any]
    seconds: float
    commit: str = ""
    device: str = ""
    series: list[dict[str, float]] = []  # noqa: RUF012, never changed
    more: dict[str, Any] = {}  # noqa: RUF012, never changed


def train(
    recipe: str,
    settings: Settings,
    keep_series: bool = False,
    backend: str | None = None,
    inspect: Callable[[Path], dict[str, Any]] = lambda folder: {},
    keep_checkpoints: bool = False,
    teacher: Teacher | None = None,
) -> Run:
    """Trains, or looks up the results of an earlier call.

    Args:
        recipe: the name of a file in `configs/`.
        settings: fields that differ from it, such as `{"pool.learning_rate": 1e-2}`.
        keep_series: whether to keep the figures of every evaluation.
        backend: backend of JAX ("cpu", "gpu", "tpu"). If given, results from others are ignored.
        inspect: function that measures something in the folder of the finished run.
        keep_checkpoints: whether the finished run keeps its checkpoints.
        teacher: the teacher, if the recipe is one of a student.

    Raises:
        RuntimeError: if training fails other than by divergence, or is stopped.
    """
    if (found := _look_up(recipe, settings, backend, teacher)) is not None:
        return found
    folder = folder_of(recipe, settings, teacher)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    if _train(recipe, settings, folder, teacher):
        report = json.loads((folder / "report.json").read_text())
        loss = report["validation"]["all"]["nats_per_token"]["after"]
        series = _series(folder) if keep_series else []
        seconds, more = time.monotonic() - start, inspect(folder)
        found = Run(loss, report["experts"], seconds, commit(), device(), series, more)
    else:
        found = Run(math.inf, {}, time.monotonic() - start, commit(), device())
    _write_down(recipe, settings, found, teacher)
    if not keep_checkpoints:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return found


def measured_by(module: str) -> Callable[[Path], Any]:
    """Returns a function that measures something in the folder of a run, in another process.

    This process trains several models at once.

    Args:
        module: a module that, with the folder as its argument, prints JSON as its last line.
    """

    def measure(folder: Path) -> Any:
        command = [sys.executable, "-m", module, str(folder)]
        found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return json.loads(found.stdout.splitlines()[-1])

    return measure


def folder_of(recipe: str, settings: Settings, teacher: Teacher | None = None) -> Path:
    """Returns the folder of a run, which exists if this machine trained it."""
    if teacher is None:
        return ROOT / recipe / _name_of(settings)
    digest = hashlib.sha256(json.dumps(teacher).encode()).hexdigest()[:16]
    return ROOT / recipe / _name_of({**settings, "teacher": digest})


def checkpoints_of(recipe: str, settings: Settings) -> Path:
    """Returns the folder of a run with its checkpoints. It is trained if they are not there."""
    folder = folder_of(recipe, settings)
    if not (folder / "report.json").exists() or not (folder / "checkpoints").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not _train(recipe, settings, folder):
            raise RuntimeError(f"the run in {folder} diverged, so it has no checkpoint")
    return folder


def _name_of(settings: Settings) -> str:
    """Returns the name of a folder. File systems allow at most 255 characters."""
    name = ",".join(f"{field}={value}" for field, value in sorted(settings.items()))
    if len(name) <= 255:
        return name
    return f"{name[:200]},{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _look_up(
    recipe: str, settings: Settings, backend: str | None, teacher: Teacher | None = None
) -> Run | None:
    wanted = {"recipe": recipe, "settings": settings, "teacher": None} | _of_teacher(teacher)
    wanted = json.loads(json.dumps(wanted))
    wanted |= {} if backend is None else {"backend": backend}
    lines = LEDGER.read_text().splitlines() if LEDGER.exists() else []
    for record in map(json.loads, lines):
        if wanted.items() <= {"teacher": None, **record}.items():
            loss = record["nats_per_token"]
            fields = {name: record[name] for name in Run._fields if name in record}
            return Run(**fields | {"nats_per_token": math.inf if loss is None else loss})
    return None


def _series(folder: Path) -> list[dict[str, float]]:
    """Returns the figures of every evaluation, with those of the training step before it."""
    by_step: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        by_step.setdefault(record["step"], {}).update(record)
    measured = "validation/all/nats_per_token"
    return [each for each in by_step.values() if measured in each]


def _of_teacher(teacher: Teacher | None) -> dict[str, Any]:
    return {} if teacher is None else {"teacher": teacher._asdict()}


def _write_down(
    recipe: str, settings: Settings, found: Run, teacher: Teacher | None = None
) -> None:
    """Adds a line to the ledger. A loss that is not finite is `null`."""
    loss = found.nats_per_token if math.isfinite(found.nats_per_token) else None
    record = {
        "recipe": recipe,
        "settings": settings,
        **_of_teacher(teacher),
        **{name: value for name, value in found._asdict().items() if value or name not in OPTIONAL},
        "nats_per_token": loss,
        "backend": jax.default_backend(),
    }
    with LEDGER.open("a") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        ledger.write(json.dumps(record) + "\n")


def _train(recipe: str, settings: Settings, folder: Path, teacher: Teacher | None = None) -> bool:
    """Trains, and returns whether the run finished. Otherwise it diverged."""
    overrides = [f"--config.{field}={value}" for field, value in settings.items()]
    script = ["train.py" if teacher is None else "distill.py"]
    script += [f"--config=configs/{recipe}.py", f"--workdir={folder}"]
    if teacher is not None:
        script.append(f"--teacher={checkpoints_of(*teacher)}")
    command = [sys.executable, *script, *overrides]
    core = _free_cores.get()
    if core is not None:
        command = ["taskset", "--cpu-list", str(core), *command]
    try:
        with (folder / "output.txt").open("a") as output:
            process = subprocess.run(
                command, cwd=REPOSITORY, stdout=output, stderr=subprocess.PIPE, text=True,
                check=False, env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(COMPILED)},
            )  # fmt: skip
    finally:
        _free_cores.put(core)
    if process.returncode not in (0, DivergenceError.exit_status):
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stderr}")
    if not process.returncode and not (folder / "report.json").exists():
        raise RuntimeError(f"training in {folder} was stopped; start the benchmark again to resume")
    return not process.returncode


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Executes jobs, as many at once as there are cores, and returns their results in order.

    After a failed job, or Ctrl-C, no other job is started.
    """
    with ThreadPoolExecutor(len(CORES)) as pool:
        try:
            return [future.result() for future in [pool.submit(job) for job in jobs]]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def from_seeds(
    recipe: str, arms: Mapping[Any, Settings], seeds: Sequence[int], **options: Any
) -> dict[Any, list[Run]]:
    """Trains every arm from every seed, as many at once as there are cores.

    Runs that are compared are of one backend. It is one for which earlier calls have trained all of
    them, or otherwise the present one.

    Args:
        recipe: the name of a file in `configs/`.
        arms: settings of each arm, by any key. Arms of equal settings are trained once.
        seeds: the seeds to train from.
        **options: further arguments of `train`.

    Returns:
        The runs of each arm, in order of seeds, by the same keys.
    """
    every = {key: [{**settings, "seed": seed} for seed in seeds] for key, settings in arms.items()}
    distinct = {_name_of(settings): settings for of_arm in every.values() for settings in of_arm}
    backend = next(
        (
            each
            for each in BACKENDS
            if all(_look_up(recipe, settings, each) for settings in distinct.values())
        ),
        jax.default_backend(),
    )
    found = at_once(
        [
            partial(train, recipe, settings, backend=backend, **options)
            for settings in distinct.values()
        ]
    )
    runs = dict(zip(distinct, found, strict=True))
    return {key: [runs[_name_of(settings)] for settings in of_arm] for key, of_arm in every.items()}


def rung(value: float, steps: int) -> float:
    """Returns the value `steps` places after `value` in ..., 1e-3, 3e-3, 1e-2, 3e-2, ..."""
    exponent = round(2 * math.log10(value)) + steps
    return float(f"{3 if exponent % 2 else 1}e{exponent // 2}")


def tune(
    loss_of: Callable[[float], float], start: float
) -> tuple[float, list[tuple[float, float]]]:
    """Finds the best of the values that `rung` returns.

    Tries three values, and then further ones while the best is at an edge.

    Returns:
        The best value, and all pairs (value, loss) that were tried, in ascending order.
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


def tune_rates(
    recipe: str,
    settings: Settings,
    rates: Mapping[str, float],
    steps: int,
    teacher: Teacher | None = None,
) -> tuple[dict[str, float], dict[str, list[tuple[float, float]]]]:
    """Tunes learning rates one after the other, each at the best of those before it.

    Args:
        recipe: the name of a file in `configs/`.
        settings: fields that differ from it.
        rates: the fields to tune, with their start values.
        steps: number of steps at full length. Tuning runs have a third of them, a third of which is
            warm-up.
        teacher: the teacher, if the recipe is one of a student.

    Returns:
        The best value of each rate, and for each rate all pairs (value, loss) that were tried, in
        ascending order.
    """
    short = {"steps": steps // 3, "optimizer.warmup_steps": steps // 9, "seed": 0}
    best, tables = dict(rates), {}
    for field in rates:

        def loss_of(rate: float, field: str = field) -> float:
            fields = {**settings, **short, **best, field: rate}
            return train(recipe, fields, teacher=teacher).nats_per_token

        best[field], tables[field] = tune(loss_of, best[field])
    return best, tables


def made_by(runs: Iterable[Run]) -> list[dict[str, str]]:
    """Returns the commits and devices that trained the runs, which may not be the present ones."""
    every = sorted({(run.commit, run.device) for run in runs})
    return [{"commit": commit, "device": device} for commit, device in every]


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Returns the interval of `first - second`, seed by seed."""
    differences = np.subtract(first, second)
    quantile = scipy.stats.t.ppf(0.975, len(differences) - 1)
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return Interval(float(differences.mean()), float(quantile * error))
