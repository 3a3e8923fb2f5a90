"""What the benchmarks of distillation share: teachers, students and the share of a gap they close.

A teacher is a float run of one epoch. A student reads a tenth of the teacher's tokens. It is
compared with the teacher *trained on*: from the teacher's weights, on text alone, for as many
tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.protocol import OF_POOLS, SEEDS, SHARED
from benchmarks.recipes import config_of
from benchmarks.sweep import Interval, Run, Settings, Teacher, at_once, paired, train, tune_rates

PART = 0.1  # of the teacher's tokens
SPLIT: Settings = {"data.validation_fraction": 0.15}
START = {SHARED: 1e-3, OF_POOLS: 3e-3}
ON_TEXT_ALONE: Settings = {
    "distill.alpha": (0.0, 0.0), "distill.beta": (0.0, 0.0), "distill.start": "rounded",
}  # fmt: skip
QUICK: Settings = {"data.sequence_length": 64, "eval.rows": 4, "eval.every": 4}


class Plan(NamedTuple):
    """The size of an experiment.

    Attributes:
        steps: steps of a teacher.
        seeds: seeds of the teachers. A student has the seed of its teacher.
        settings: settings of all runs.
    """

    steps: int
    seeds: Sequence[int]
    settings: Settings

    @staticmethod
    def of(recipe: str, quick: bool) -> "Plan":
        """Returns the plan for teachers of a recipe."""
        if quick:
            return Plan(10, SEEDS[:2], {**QUICK, **SPLIT})
        return Plan(config_of(recipe).steps, SEEDS, SPLIT)

    @property
    def student_steps(self) -> int:
        """Steps of a student."""
        return max(round(PART * self.steps), 3)

    def teachers(self, recipe: str, settings: Settings) -> list[Teacher]:
        """Returns one teacher for each seed."""
        same = {**self.settings, **settings, "steps": self.steps}
        return [Teacher(recipe, {**same, "seed": seed}) for seed in self.seeds]


def train_teachers(teachers: Sequence[Teacher]) -> list[Run]:
    """Trains the teachers that no earlier call trained, and returns their results."""

    def job(teacher: Teacher) -> Run:
        return train(*teacher, keep_series=True, keep_checkpoints=True)

    return at_once([lambda teacher=teacher: job(teacher) for teacher in teachers])


class Students(NamedTuple):
    """Students of one kind.

    Attributes:
        rates: their learning rates.
        tuning: pairs (rate, loss) that were tried for each.
        runs: one for each teacher, with its comparison in `more`.
    """

    rates: dict[str, float]
    tuning: dict[str, Any]
    runs: list[Run]

    def of_start(self, figure: str, title: str | None = None) -> list[float]:
        """Returns a figure of a stage of each start; by default, of the one with least loss."""
        found = []
        for run in self.runs:
            stages = {each["title"]: each["texts"]["all"] for each in run.more["starts"]}
            best = min(stages.values(), key=lambda texts: texts["student"])
            found.append((best if title is None else stages[title])[figure])
        return found

    def of_end(self, figure: str) -> list[float]:
        """Returns a figure of each comparison at the end."""
        return [run.more["texts"]["all"][figure] for run in self.runs]


def tune_and_distil(
    plan: Plan, recipe: str, settings: Settings, teachers: Sequence[Teacher]
) -> Students:
    """Tunes the learning rates of a student of the first teacher, and trains one of each."""
    same = {**plan.settings, "eval.every": plan.student_steps, **settings}
    rates, tuning = tune_rates(recipe, same, START, plan.student_steps, teachers[0])

    def job(teacher: Teacher) -> Run:
        own = {**same, **rates, "steps": plan.student_steps, "seed": teacher.settings["seed"]}
        return train(recipe, own, teacher=teacher, inspect=_comparison, keep_series=True)

    return Students(rates, tuning, at_once([lambda each=each: job(each) for each in teachers]))


def _comparison(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "distillation.json").read_text())


def closed(before: Sequence[float], after: Sequence[float], bottom: Sequence[float]) -> Interval:
    """Returns the share of the gap that training closes, with its 95% interval over teachers.

    Args:
        before: losses at the start.
        after: losses at the end.
        bottom: losses of the teachers that were trained on.
    """
    shares = np.subtract(before, after) / np.subtract(before, bottom)
    return paired(shares.tolist(), [0.0] * len(shares))


def last_fifth(run: Run) -> float:
    """Returns how much of its loss a run loses in the last fifth of its steps."""
    losses = [(each["step"], each["validation/all/nats_per_token"]) for each in run.series]
    end, last = losses[-1]
    before = min(losses, key=lambda point: abs(point[0] - 0.8 * end))[1]
    return (before - last) / last
