"""Trains small models with pools of few levels for 10,000 steps, and follows their scales."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import matplotlib.figure
import numpy as np

from benchmarks.result import REPOSITORY, Figure, Result
from benchmarks.sweep import ROOT, Run, Settings, at_once, made_by, train

RECIPE = "quickstart"
STORAGES = ("int4", "int3", "ternary")
STEPS, QUICK_STEPS = 10_000, 40
SMALL: Settings = {
    "model.width": 64, "model.heads": 2, "model.layers": (("dense", 1), ("peer", 1)),
    "mlp.hidden": 256, "peer.num_experts": (64, 64), "data.sequence_length": 64, "eval.rows": 64,
    "checkpoint.every": 1000, "pool.learning_rate": 1e-2,
}  # fmt: skip
SCALE, SATURATED = "log_scale", "saturated_rows"


def run(quick: bool) -> Result:
    """Trains what no earlier call trained, and shows scales over steps."""
    steps = QUICK_STEPS if quick else STEPS
    jobs = {
        storage: partial(
            train,
            RECIPE,
            {**SMALL, "pool.storage": storage, "steps": steps, "eval.every": steps // 20},
            keep_series=True,
        )
        for storage in STORAGES
    }
    runs: dict[str, Run] = dict(zip(jobs, at_once(list(jobs.values())), strict=True))
    plot(runs, ROOT / "scales" if quick else REPOSITORY / "docs" / "distill")
    return Result(
        columns=("pools", "nats/token", "scale at a tenth", "half", "the end", "saturated vectors"),
        rows=[
            [
                storage,
                f"{each.nats_per_token:.4f}",
                *(f"{np.exp(_at(each, SCALE, part)):.4f}" for part in (0.1, 0.5, 1.0)),
                f"{_at(each, SATURATED, 1.0):.1%}",
            ]
            for storage, each in runs.items()
        ],
        figures=[
            Figure.at_most(
                f"{storage}: |change of the logarithm of the scale| in the second half",
                abs(_at(each, SCALE, 1.0) - _at(each, SCALE, 0.5)),
                float(np.log(2)),
            )
            for storage, each in runs.items()
        ],
        details={
            "runs": {storage: each.series for storage, each in runs.items()},
            "made_by": made_by(runs.values()),
        },
    )


def _points(run: Run, figure: str) -> list[tuple[float, float]]:
    """Returns pairs (step, figure) of the one PEER layer."""
    (name,) = (each for each in run.series[0] if each.endswith(f"/{figure}"))
    return [(each["step"], each[name]) for each in run.series]


def _at(run: Run, figure: str, part: float) -> float:
    points = _points(run, figure)
    return min(points, key=lambda point: abs(point[0] - part * points[-1][0]))[1]


def plot(runs: Mapping[str, Run], folder: Path) -> None:
    """Draws the mean scale over steps."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for storage, each in runs.items():
        steps, logs = zip(*_points(each, SCALE), strict=True)
        axes.plot(steps, np.exp(logs), label=storage)
    axes.set(xlabel="step", ylabel="geometric mean of scales", yscale="log")
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "scales.png", dpi=100)
