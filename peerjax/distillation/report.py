"""The report of a distilled model: what it lost, and what it takes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import rich.console
from etils import epath

from pallas_kernels.codes import CODES
from pallas_kernels.storage import is_pool
from peerjax.atomic import write_atomically
from peerjax.evaluation import ALL
from peerjax.plots import plot_distillation
from peerjax.pool import memory_report
from peerjax.tables import print_table
from peerjax.training.metrics import read_metrics
from peerjax.training.report import FILE as TRAINING

FIGURES = ("nats/token", "gap", "relative", "KL", "top 1")
FILE, STARTS, PLOT = "distillation.json", "starts.json", "distillation.png"


def write(
    folder: epath.Path,
    config: ml_collections.ConfigDict,
    texts: Mapping[str, Mapping[str, float]],
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
) -> None:
    """Writes `distillation.json` and its plot.

    Args:
        folder: folder of the student's run, whose training has finished.
        config: its configuration.
        texts: the comparison, by text.
        teacher: variables of the teacher.
        student: variables of the student.
    """
    training = json.loads((folder / TRAINING).read_text())
    tokens, speed = training["steps"] * training["tokens_per_step"], training["tokens_per_second"]
    record = {
        "teacher": config.distill.teacher,
        "steps": training["steps"],
        "tokens": tokens,
        "seconds": tokens / speed if speed else None,
        "starts": starts_of(folder),
        "texts": texts,
        "bytes": {"teacher": bytes_of(teacher), "student": bytes_of(student)},
    }
    plot_distillation(
        folder / PLOT, read_metrics(folder), texts, record["starts"], training["tokens_per_step"]
    )
    write_atomically(folder / FILE, json.dumps(record, indent=1))


def is_written(folder: epath.Path, steps: int) -> bool:
    """Returns whether the folder has the report of the run after a number of steps."""
    path = folder / FILE
    return path.exists() and json.loads(path.read_text())["steps"] == steps


def starts_of(folder: epath.Path) -> Sequence[Mapping[str, Any]]:
    """Returns the stages of the student's start, if it started from its teacher."""
    path = folder / STARTS
    return json.loads(path.read_text()) if path.exists() else []


def bytes_of(variables: Mapping[str, Any]) -> dict[str, float]:
    """Returns the bytes of a model's variables by part, and experts per gigabyte.

    "levels" is what codes would take if a code of n levels took log2(n) bits. Codes of int3 fill
    four bits.
    """
    pools = jax.tree.leaves(variables["pools"], is_leaf=is_pool)
    memory = memory_report(variables["pools"])
    levels = sum(
        pool.num_parameters * math.log2(2 * CODES[pool.storage].top + 1) / 8
        if pool.is_packed
        else pool.weights.nbytes
        for pool in pools
    )
    found = {
        "other parameters": sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"])),
        **memory.parts,
    }
    if pools:
        found |= {"levels": levels, "experts per GB": memory.experts_per_gb}
    return found


def print_report(folder: epath.Path) -> None:
    """Prints the report of a finished student."""
    record = json.loads((folder / FILE).read_text())
    console = rich.console.Console(highlight=False, soft_wrap=True)
    if starts := record["starts"]:
        rows = [[each["title"], *_figures(each["texts"][ALL])] for each in starts]
        print_table(console, "Before training", ("start", *FIGURES), rows)
    texts = record["texts"]
    rows = [[text, f"{each['teacher']:.4f}", *_figures(each)] for text, each in texts.items()]
    print_table(console, "Student, and its gap to the teacher", ("text", "teacher", *FIGURES), rows)
    both = [record["bytes"][name] for name in ("teacher", "student")]
    parts = list(dict.fromkeys([*both[0], *both[1]]))
    rows = [
        [part, *("" if part not in each else f"{each[part]:,.0f}" for each in both)]
        for part in parts
    ]
    print_table(console, "Bytes", ("part", "teacher", "student"), rows)
    seconds = record["seconds"]
    console.print(
        f"{record['tokens']:,} tokens{f' in {seconds:,.0f} seconds' if seconds else ''}; "
        f"figures: {folder / FILE}, plot: {folder / PLOT}"
    )


def _figures(found: Mapping[str, float]) -> list[str]:
    """Returns the cells of a comparison, in the order of `FIGURES`."""
    return [
        f"{found['student']:.4f}",
        f"{found['gap']:+.4f}±{(found['gap_high'] - found['gap_low']) / 2:.4f}",
        f"{found['gap'] / found['teacher']:+.2%}",
        f"{found['divergence']:.4f}",
        f"{found['agreement']:.1%}",
    ]
