"""Distils Monet to PEER with pools of int4: with Monet's routers, and with routers of PEER.

The teachers are float models with Monet layers in vertical decomposition. Their losses are compared
with those of each stage of the conversion, of both students, and of a PEER that trains from scratch
on the tokens of teacher and student together. Teachers of three widths show how the tokens that a
student needs grow.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib.figure
import numpy as np

from benchmarks.monet_models import VD, arm_named
from benchmarks.result import REPOSITORY, Figure, Result
from benchmarks.students import Plan, Students, train_teachers, tune_and_distil
from benchmarks.sweep import ROOT, Run, Settings, Teacher, at_once, from_seeds, made_by, paired

RECIPE, STUDENT = "reference", "distill/monet_to_peer"
ROUTERS = {"Monet's router": "monet", "plain": "monet_plain"}
SCRATCH = "PEER, from scratch"
WIDTHS = (64, 96, 128)
WITHIN = 0.01  # of the teacher's loss
EVALUATIONS = 12


def monet(width: int) -> Settings:
    """Returns the settings of a teacher."""
    same = {
        name: value
        for name, value in arm_named(VD).settings.items()
        if name.startswith(("monet.", "model.layers"))
    }
    return {**same, "model.width": width}


def run(quick: bool) -> Result:
    """Trains what no earlier call trained, and compares the students."""
    plan = Plan.of(RECIPE, quick)
    widths = WIDTHS[:1] if quick else WIDTHS
    teachers: dict[int, Sequence[Teacher]] = {
        width: plan.teachers(RECIPE, monet(width)) for width in widths
    }
    main = widths[-1]
    teachers |= {width: teachers[width][:1] for width in widths if width != main}
    trained = at_once([partial(train_teachers, teachers[width]) for width in widths])
    of_teachers = dict(zip(widths, trained, strict=True))
    every = {"eval.every": max(plan.student_steps // EVALUATIONS, 1)}
    jobs = {
        (name, width): partial(
            tune_and_distil, plan, STUDENT, {"distill.start": start, **every}, teachers[width]
        )
        for name, start in ROUTERS.items()
        for width in widths
    }
    students = dict(zip(jobs, at_once(list(jobs.values())), strict=True))
    whole = {**plan.settings, "steps": plan.steps + plan.student_steps, "model.width": main}
    scratch = from_seeds(RECIPE, {SCRATCH: whole}, plan.seeds)[SCRATCH]
    plot(students, main, ROOT / "monet_to_peer" if quick else REPOSITORY / "docs" / "distill")
    return Result(
        columns=("model", "width", "stage", "nats/token", "beyond the teacher"),
        rows=_rows(students, scratch, main),
        figures=_figures(students, of_teachers, scratch, main),
        details={
            "teachers": {
                width: [each.nats_per_token for each in runs]
                for width, runs in of_teachers.items()
            },
            "scratch": [each.nats_per_token for each in scratch],
            "students": [
                {
                    "student": name, "width": width, "rates": each.rates, "tuning": each.tuning,
                    "tokens within 1%": tokens_needed(each),
                    "seconds": [run.seconds for run in each.runs],
                    "series": [run.series for run in each.runs],
                    "reports": [run.more for run in each.runs],
                }
                for (name, width), each in students.items()
            ],
            "made_by": made_by(
                [*scratch, *(run for each in students.values() for run in each.runs)]
            ),
        },
    )  # fmt: skip


def tokens_needed(students: Students) -> list[float | None]:
    """Returns the tokens after which each student was within 1% of its teacher, or `None`."""
    found: list[float | None] = []
    for run in students.runs:
        teacher = run.more["texts"]["all"]["teacher"]
        per_step = run.more["tokens"] / run.more["steps"]
        reached = [
            each["step"] * per_step
            for each in run.series
            if each["validation/all/nats_per_token"] <= (1 + WITHIN) * teacher
        ]
        found.append(min(reached, default=None))
    return found


def _rows(
    students: Mapping[tuple[str, int], Students], scratch: Sequence[Run], main: int
) -> list[list[str]]:
    rows = []
    for (name, width), each in students.items():
        stages: dict[str, list[tuple[float, float]]] = {}
        for run in each.runs:
            for stage in [*run.more["starts"], {"title": "distilled", "texts": run.more["texts"]}]:
                of_all = stage["texts"]["all"]
                stages.setdefault(stage["title"], []).append((of_all["student"], of_all["gap"]))
        for title, both in stages.items():
            loss, gap = np.mean(both, axis=0)
            rows.append([name, str(width), title, f"{loss:.4f}", f"{gap:+.4f}"])
    losses = [each.nats_per_token for each in scratch]
    teacher = np.mean(students["plain", main].of_end("teacher"))
    mean = np.mean(losses)
    return [*rows, [SCRATCH, str(main), "", f"{mean:.4f}", f"{mean - teacher:+.4f}"]]


def _figures(
    students: Mapping[tuple[str, int], Students],
    teachers: Mapping[int, Sequence[Run]],
    scratch: Sequence[Run],
    main: int,
) -> list[Figure]:
    figures = []
    for name in ROUTERS:
        each = students[name, main]
        after, before = each.of_end("student"), each.of_end("teacher")
        figures += paired(after, before).figures(f"{name}: gap (nats/token)")
        relative = float(np.mean(np.subtract(after, before)) / np.mean(before))
        figures.append(Figure.at_most(f"{name}: relative gap", relative, WITHIN))
        losses = [run.nats_per_token for run in scratch]
        figures += paired(after, losses).figures(f"{name} - {SCRATCH} (nats/token)")
        for width in teachers:
            needed = [each for each in tokens_needed(students[name, width]) if each is not None]
            if needed:
                title = f"{name}, width {width}: million tokens until within 1%"
                figures.append(Figure(title, float(np.mean(needed)) / 1e6))
    return figures


def plot(students: Mapping[tuple[str, int], Students], main: int, folder: Path) -> None:
    """Draws the gap to the teacher over the student's tokens, by router and width."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for index, ((name, width), each) in enumerate(students.items()):
        for run in each.runs:
            per_step = run.more["tokens"] / run.more["steps"] / 1e6
            teacher, loss = run.more["texts"]["all"]["teacher"], "validation/all/nats_per_token"
            points = [(each["step"] * per_step, each[loss] / teacher - 1) for each in run.series]
            label = f"{name}, width {width}" if run is each.runs[0] else None
            axes.plot(*zip(*points, strict=True), f"C{index}", label=label)
    axes.axhline(WITHIN, color="grey", linestyle=":")
    axes.set(xlabel="million tokens", ylabel="loss beyond the teacher (relative)")
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "monet_to_peer.png", dpi=100)
