"""Compares the gates of PEER: losses at equal mean numbers of active experts, and at equal time.

The quickstart is trained with every gate and number. Learning rates are tuned for each gate at the
middle number. The time of a step is measured in turns. A layer's mutual information of expert and
domain is compared with that of groups of rows drawn at random.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import matplotlib.figure
import numpy as np

from benchmarks.protocol import (
    EVALUATION,
    QUICK_STEPS,
    RECIPE,
    SEEDS,
    START,
    STEPS,
)
from benchmarks.result import REPOSITORY, Figure, Result
from benchmarks.short_run import seconds_in_turns
from benchmarks.sweep import (
    ROOT,
    Run,
    Settings,
    at_once,
    from_seeds,
    made_by,
    measured_by,
    paired,
    tune_rates,
)
from peerjax.data.pipeline import load_corpus, validation_rows
from peerjax.evaluation import ALL, evaluate
from peerjax.evaluation.specialisation import specialisation
from peerjax.inference.trained import open_run, restore
from peerjax.routing.gates import ADAPTIVE_GATES
from peerjax.sharding import make_mesh

COMPARED = ("softmax", *ADAPTIVE_GATES)
HEADS = 4
NUMBERS, MIDDLE = (16, 32, 64), 32
LAYERS = ("layer_1", "layer_2")
ACTIVE, IN_BATCH = "active_in_training", "active/layers_1-2"
ROWS, DRAWS = 96, 5
TIMED_STEPS, ROUNDS = 40, 3
QUICK: Settings = {"data.sequence_length": 64, "eval.rows": 4}


def settings_of(gate: str, number: int) -> Settings:
    """Returns the fields of an arm. Adaptive gates retrieve four times as many experts."""
    if gate == "softmax":
        return {"peer.experts_per_head": number // HEADS}
    return {"peer.gate": gate, "peer.target": float(number), "peer.experts_per_head": number}


def run(quick: bool) -> Result:
    """Tunes every gate, trains every arm, and compares them."""
    steps, seeds = (QUICK_STEPS, SEEDS[:2]) if quick else (STEPS, SEEDS)
    numbers = (MIDDLE,) if quick else NUMBERS
    common = {**EVALUATION, "eval.every": steps, **(QUICK if quick else {})}
    middle = [{**common, **settings_of(gate, MIDDLE)} for gate in COMPARED]
    jobs = [partial(tune_rates, RECIPE, settings, START, steps) for settings in middle]
    rates = dict(zip(COMPARED, at_once(jobs), strict=True))
    arms = {
        (gate, number): {**common, **settings_of(gate, number), "steps": steps, **rates[gate][0]}
        for gate in COMPARED
        for number in numbers
    }
    runs = from_seeds(
        RECIPE, arms, seeds, keep_series=True, inspect=measured_by("benchmarks.gates")
    )
    timed = seconds_in_turns(RECIPE, arms, *((8, 1) if quick else (TIMED_STEPS, ROUNDS)))
    seconds = {arm: float(np.median(each)) for arm, each in timed.items()}
    plot(runs, seconds, ROOT / "gates" if quick else REPOSITORY / "docs" / "gates")
    return Result(
        columns=(
            "gate, target", "rates", "nats/token", "active in training", "on validation text",
            "no expert", "cut off", "ms a step",
            "information", "at random",
        ),
        rows=[_row(*arm, rates[arm[0]][0], each, seconds[arm]) for arm, each in runs.items()],
        figures=_figures(runs, seconds),
        details={
            "tuning": {gate: tables for gate, (_, tables) in rates.items()},
            "arms": [
                {
                    "gate": gate, "target": number, "rates": rates[gate][0],
                    "losses": _losses(each),
                    "active_in_training": [run.more.get(ACTIVE) for run in each],
                    "active": _active(each, "mean"),
                    "none": _active(each, "none"), "cut_off": _active(each, "cut_off"),
                    "seconds_per_step": timed[gate, number],
                    "information": [run.more for run in each], "made_by": made_by(each),
                }
                for (gate, number), each in runs.items()
            ],
        },
    )  # fmt: skip


Runs = Mapping[tuple[str, int], Sequence[Run]]
Seconds = Mapping[tuple[str, int], float]


def _numbers(runs: Runs) -> list[int]:
    return sorted({number for _, number in runs})


def _losses(runs: Sequence[Run]) -> list[float]:
    return [run.nats_per_token for run in runs]


def _active(runs: Sequence[Run], figure: str) -> list[float] | None:
    """Returns a figure of active experts after the last step, as a mean over layers."""
    names = [f"active/{layer}/{figure}" for layer in LAYERS]
    if names[0] not in runs[0].series[-1]:
        return None
    return [float(np.mean([run.series[-1][name] for name in names])) for run in runs]


def _mean_active(number: int, runs: Sequence[Run]) -> float:
    return float(np.mean(_active(runs, "mean") or [number]))


def _in_training(number: int, runs: Sequence[Run]) -> list[float]:
    return [run.more.get(ACTIVE, number) for run in runs]


def _row(
    gate: str, number: int, rates: Mapping[str, float], runs: Sequence[Run], seconds: float
) -> list[str]:
    def percent(figure: str) -> str:
        found = _active(runs, figure)
        return "" if found is None else f"{np.mean(found):.1%}"

    return [
        f"{gate}, {number}",
        " ".join(f"{rate:g}" for rate in rates.values()),
        f"{np.mean(_losses(runs)):.4f}",
        f"{np.mean(_in_training(number, runs)):.1f}",
        f"{_mean_active(number, runs):.1f}",
        percent("none"),
        percent("cut_off"),
        f"{1e3 * seconds:.0f}",
        f"{_mean_information(runs, 'domains'):.4f}",
        f"{_mean_information(runs, 'random'):.4f}",
    ]


def _mean_information(runs: Sequence[Run], kind: str) -> float:
    return float(np.mean([run.more[layer][kind] for run in runs for layer in LAYERS]))


def _figures(runs: Runs, seconds: Seconds) -> list[Figure]:
    figures = []
    for number in _numbers(runs):
        softmax = runs["softmax", number]
        for gate in COMPARED[1:]:
            own, name = runs[gate, number], f"{gate} - softmax, {number} active"
            difference = paired(_losses(own), _losses(softmax))
            figures += difference.figures(f"{name} (nats/token)")
            figures.append(
                Figure.at_most(
                    f"{gate}, {number}: |active in training / target - 1|, largest of all seeds",
                    max(abs(each / number - 1) for each in _in_training(number, own)),
                    0.05,
                )
            )
            figures.append(
                Figure.at_most(
                    f"{gate}, {number}: |active on validation text / target - 1|, mean of seeds",
                    abs(_mean_active(number, own) / number - 1),
                    0.05,
                )
            )
            information = [
                [np.mean([run.more[layer]["domains"] for layer in LAYERS]) for run in each]
                for each in (own, softmax)
            ]
            figures += paired(*information).figures(f"{name}: information (nats)")
            gap = float(np.mean(_losses(own))) - _softmax_at(runs, seconds, seconds[gate, number])
            figures.append(Figure(f"{gate} - softmax in the same time, {number} active", gap))
    return figures


def _softmax_at(runs: Runs, seconds: Seconds, time: float) -> float:
    """Returns the softmax's loss for a time of a step, between its numbers of active experts."""
    points = sorted(
        (seconds["softmax", number], np.mean(_losses(runs["softmax", number])))
        for number in _numbers(runs)
    )
    return float(np.interp(time, *zip(*points, strict=True)))


def active_in_training(workdir: str) -> dict[str, float]:
    """Returns the mean number of active experts a token in the last fifth of a run's steps."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    found = [record[IN_BATCH] for record in map(json.loads, lines) if IN_BATCH in record]
    return {ACTIVE: float(np.mean(found[-len(found) // 5 :]))} if found else {}


def information_of(workdir: str) -> dict[str, dict[str, float]]:
    """Returns each layer's mutual information of expert and domain, and of expert and groups.

    The groups are of as many rows as the domains have, drawn at random from all of them.
    """
    trained, mesh = open_run(workdir), make_mesh()
    with jax.set_mesh(mesh):
        found = specialisation(
            partial(evaluate, trained.model, restore(trained, mesh), mesh=mesh),
            trained.model,
            load_corpus(trained.config).validation,
            partial(validation_rows, count=ROWS),
            DRAWS,
        )
    return {
        layer: {
            "domains": units["experts"][ALL]["domains"],
            "random": units["experts"][ALL]["shuffled"],
        }
        for layer, units in found.items()
    }


def plot(runs: Runs, seconds: Seconds, folder: Path) -> None:
    """Draws losses against active experts and against time."""
    figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for gate in COMPARED:
        numbers = _numbers(runs)
        arms = [runs[gate, number] for number in numbers]
        losses = [np.mean(_losses(each)) for each in arms]
        active = [_mean_active(number, each) for number, each in zip(numbers, arms, strict=True)]
        left.plot(active, losses, marker="o", label=gate)
        times = [1e3 * seconds[gate, number] for number in numbers]
        right.plot(times, losses, marker="o", label=gate)
    left.set(xscale="log", xlabel="active experts a token", ylabel="validation loss, nats/token")
    right.set(xlabel="ms a step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "losses.png", dpi=100)


if __name__ == "__main__":
    print(json.dumps(active_in_training(sys.argv[1]) | information_of(sys.argv[1])))
