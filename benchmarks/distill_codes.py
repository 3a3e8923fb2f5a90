"""Distils a float model to pools of int8, int4, int3 and ternary codes.

Each format has its learning rates tuned. A gap is the loss beyond that of the teacher trained on
for the tokens of the student. It runs from the best rounding to nearest down to that teacher.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib.figure
import numpy as np

from benchmarks.protocol import OF_POOLS, SHARED
from benchmarks.result import REPOSITORY, Figure, Result
from benchmarks.students import (
    ON_TEXT_ALONE,
    Plan,
    Students,
    closed,
    last_fifth,
    train_teachers,
    tune_and_distil,
)
from benchmarks.sweep import ROOT, Run, at_once, from_seeds, made_by, paired

RECIPE = "reference"
FORMATS = ("int8", "int4", "int3", "ternary")
TRAINED_ON, FROM_SCRATCH = "float32, trained on", "int4, from scratch"
LARGEST_GAPS = {"int8": 0.0002, "int4": 0.001}  # relative


def run(quick: bool) -> Result:
    """Trains what no earlier call trained, and compares the formats."""
    plan = Plan.of(RECIPE, quick)
    teachers = plan.teachers(RECIPE, {"pool.storage": "float32"})
    of_teachers = train_teachers(teachers)
    jobs = {name: partial(tune_and_distil, plan, f"distill/{name}", {}, teachers)
            for name in FORMATS}  # fmt: skip
    alone = {**ON_TEXT_ALONE, "pool.storage": "float32"}
    jobs[TRAINED_ON] = partial(tune_and_distil, plan, "distill/int4", alone, teachers)
    students = dict(zip(jobs, at_once(list(jobs.values())), strict=True))
    whole = {**plan.settings, "pool.storage": "int4", "steps": plan.steps + plan.student_steps}
    scratch = from_seeds(RECIPE, {FROM_SCRATCH: whole}, plan.seeds)[FROM_SCRATCH]
    bottom = students[TRAINED_ON].of_end("student")
    plot(students, bottom, ROOT / "distill_codes" if quick else REPOSITORY / "docs" / "distill")
    return Result(
        columns=("student", "rates", "rounded", "distilled", "gap", "closed", "KL before", "KL"),
        rows=[
            *(_row(name, students[name], bottom) for name in FORMATS),
            [TRAINED_ON, _rates(students[TRAINED_ON]), "", f"{np.mean(bottom):.4f}", *[""] * 4],
            _row_of_scratch([each.nats_per_token for each in scratch], bottom),
        ],
        figures=_figures(students, of_teachers, bottom),
        details={
            "teachers": [each.nats_per_token for each in of_teachers],
            "scratch": [each.nats_per_token for each in scratch],
            "students": {
                name: {
                    "rates": each.rates,
                    "tuning": each.tuning,
                    "seconds": [run.seconds for run in each.runs],
                    "reports": [run.more for run in each.runs],
                }
                for name, each in students.items()
            },
            "made_by": made_by(
                [*of_teachers, *scratch, *(run for each in students.values() for run in each.runs)]
            ),
        },
    )


def _rates(students: Students) -> str:
    return " ".join(f"{students.rates[name]:g}" for name in (SHARED, OF_POOLS))


def _row(name: str, students: Students, bottom: Sequence[float]) -> list[str]:
    before, after = students.of_start("student"), students.of_end("student")
    gap = np.mean(np.subtract(after, bottom))
    return [
        name,
        _rates(students),
        f"{np.mean(before):.4f}",
        f"{np.mean(after):.4f}",
        f"{gap:+.4f} ({gap / np.mean(bottom):+.2%})",
        str(closed(before, after, bottom)),
        f"{np.mean(students.of_start('divergence')):.4f}",
        f"{np.mean(students.of_end('divergence')):.4f}",
    ]


def _row_of_scratch(losses: Sequence[float], bottom: Sequence[float]) -> list[str]:
    gap = np.mean(np.subtract(losses, bottom))
    gap_text = f"{gap:+.4f} ({gap / np.mean(bottom):+.2%})"
    return [FROM_SCRATCH, "", "", f"{np.mean(losses):.4f}", gap_text, "", "", ""]


def _figures(
    students: Mapping[str, Students], teachers: Sequence[Run], bottom: Sequence[float]
) -> list[Figure]:
    gained = float(np.mean([last_fifth(each) for each in teachers]))
    figures = [Figure("loss that teachers lose in the last fifth (relative)", gained)]
    for name in FORMATS:
        of_format = students[name]
        before, after = of_format.of_start("student"), of_format.of_end("student")
        figures += paired(after, bottom).figures(f"{name}: gap (nats/token)")
        relative = float(np.mean(np.subtract(after, bottom)) / np.mean(bottom))
        if name in LARGEST_GAPS:
            size = abs(relative) if name == "int8" else relative
            figures.append(Figure.at_most(f"{name}: relative gap", size, LARGEST_GAPS[name]))
        share = closed(before, after, bottom)
        low = share.mean - share.half_width
        figures.append(Figure.at_least(f"{name}: share of the gap closed", share.mean, 0.5))
        figures.append(Figure.at_least("lower end of its interval", low, 0))
        kept = np.mean(of_format.of_end("divergence")) / np.mean(of_format.of_start("divergence"))
        figures.append(Figure.at_most(f"{name}: KL at the end / at the start", float(kept), 1.0))
    return figures


def plot(students: Mapping[str, Students], bottom: Sequence[float], folder: Path) -> None:
    """Draws the gap of each format, rounded and distilled, for every teacher."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(FORMATS):
        for losses, color, label in (
            (students[name].of_start("student"), "C1", "rounded"),
            (students[name].of_end("student"), "C0", "distilled"),
        ):
            gaps = np.subtract(losses, bottom)
            axes.plot([place] * len(gaps), gaps, f"{color}o", label=None if place else label)
    axes.axhline(0, color="grey", linestyle=":")
    axes.set_xticks(range(len(FORMATS)), FORMATS)
    axes.set_yscale("symlog", linthresh=0.003)
    axes.set_ylabel("loss beyond the teacher trained on, nats/token")
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "codes.png", dpi=100)
