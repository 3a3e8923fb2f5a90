"""Compares losses of training in int4 and in other storages, rules, sizes and buffers.

The recipe is the quickstart. The learning rate of the pools is tuned for every storage and rule at
a third of the length. Then every arm trains at full length from the same seeds. Arms are compared
seed by seed.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import int4_buffers
from benchmarks.int4_arms import (
    ADAMW,
    ADAMW_SHARED,
    ARMS,
    BFLOAT16,
    COLUMNS,
    ECO,
    FLOAT32,
    INT4,
    INT8,
    against,
    at_best_rates,
    tuned,
)
from benchmarks.int4_buffers import LONG, LONG_STEPS
from benchmarks.int4_quality_plots import plot
from benchmarks.protocol import EVALUATION, QUICK_STEPS, RECIPE, SEEDS, STEPS
from benchmarks.result import Figure, Result
from benchmarks.sweep import from_seeds, made_by, paired, train, tune_rates
from pallas_kernels.expert_update import UpdateState
from peerjax.pool import initialize_pool, memory_report

WIDTH = 128
Size = tuple[str, tuple[int, int]]  # a name in `ARMS`, and how many experts
SMALL, MIDDLE, DOUBLE, LARGE = (128, 128), (256, 256), (256, 512), (512, 512)
# Storages at other numbers of experts than the quickstart's, which is the middle one.
SIZES = (
    (INT4, LARGE), (INT4, DOUBLE), (ADAMW, SMALL), (ADAMW_SHARED, SMALL), (INT4, SMALL),
    (BFLOAT16, SMALL), (BFLOAT16, DOUBLE), (INT8, SMALL), (FLOAT32, SMALL),
)  # fmt: skip


def bytes_of(name: str, num_experts: tuple[int, int]) -> tuple[int, int]:
    """Returns bytes of a layer's experts: in inference, and in training.

    Training includes dense gradients, if there are any.
    """
    storage, count = ARMS[name]["pool.storage"], math.prod(num_experts)
    pool = jax.eval_shape(
        lambda: initialize_pool(jax.random.key(0), 1, count, WIDTH, storage=storage)
    )
    kept = memory_report(pool).kept
    if ARMS[name].get("pool.rule") == "adamw":
        return kept, 4 * kept  # gradient, two moments
    return kept, memory_report(pool, jax.eval_shape(UpdateState.zeros_for, pool)).kept


def run(quick: bool) -> Result:
    """Trains all arms that no earlier call trained, and compares them."""
    steps, seeds = (QUICK_STEPS, SEEDS[:2]) if quick else (STEPS, SEEDS)
    long_steps = QUICK_STEPS if quick else LONG_STEPS
    tuning = tuned(steps)
    arms = at_best_rates(tuning, steps)
    sizes = {
        (name, root): {**arms[name], "peer.num_experts": root}
        for name, root in (SIZES[:1] if quick else SIZES)
    }
    if (ADAMW, SMALL) in sizes:  # at equal bytes, this arm may depend most on its rates
        alone = {**EVALUATION, **ARMS[ADAMW], "peer.num_experts": SMALL}
        tuning[_title(ADAMW, SMALL)] = tune_rates(RECIPE, alone, tuning[ADAMW][0], steps)
        sizes[ADAMW, SMALL] |= tuning[_title(ADAMW, SMALL)][0]
    runs = from_seeds(RECIPE, arms | sizes, seeds)
    found = {key: [run.nats_per_token for run in each] for key, each in runs.items()}
    buffers = int4_buffers.run(quick)
    long = train(
        RECIPE,
        {
            **arms[INT4], **LONG, "steps": long_steps, "eval.every": max(1, long_steps // 40),
            "seed": seeds[0],
        },
        keep_series=True,
    )  # fmt: skip
    by_size = {size: found[size] for size in sizes}
    by_size |= {(name, MIDDLE): found[name] for name in ARMS if name != ECO}
    details = {
        "steps": steps,
        "rates": {name: best for name, (best, _) in tuning.items()},
        "tuning": {name: tables for name, (_, tables) in tuning.items()},
        "storages": {name: found[name] for name in ARMS},
        "runs_of": {
            **{name: made_by(runs[name]) for name in ARMS},
            **{_title(*size): made_by(runs[size]) for size in sizes},
            "long_run": made_by([long]),
        },
        "buffers": buffers.details,
        "sizes": [
            {
                "pools": name,
                "experts": math.prod(root),
                "bytes": bytes_of(name, root),
                "losses": losses,
            }
            for (name, root), losses in by_size.items()
        ],
        "long_run": long.series,
    }
    if not quick:
        plot(details)
    return Result(
        COLUMNS,
        rows=[
            *(against(name, arms[name], found[name], found[INT4]) for name in ARMS),
            *(
                against(_title(*size), each, found[size], found[INT4])
                for size, each in sizes.items()
            ),
            *buffers.rows,
        ],
        figures=[*_figures(found), *_at_equal_bytes(by_size), *buffers.figures],
        details=details,
    )


def _figures(found: Mapping[Any, list[float]]) -> list[Figure]:
    against_floats = paired(found[INT4], found[FLOAT32])
    return [
        Figure.at_most(
            "int4 beyond float32 pools, upper end of the 95% interval, share of the loss",
            (against_floats.mean + against_floats.half_width) / float(np.mean(found[FLOAT32])),
            0.005,
        ),
        *(
            figure
            for rival in (ADAMW, ADAMW_SHARED)
            for figure in paired(found[INT4], found[rival]).figures(
                f"int4 - {rival} (nats/token)", 0.0
            )
        ),
    ]


def _at_equal_bytes(losses: Mapping[Size, list[float]]) -> list[Figure]:
    """Compares int4 with every other storage that takes the same bytes, to within a tenth."""
    figures = []
    for index, what in enumerate(("inference", "training")):
        for ours, theirs in itertools.product(losses, losses):
            ratio = bytes_of(*ours)[index] / bytes_of(*theirs)[index]
            if ours[0] == INT4 != theirs[0] and abs(ratio - 1) < 0.1:
                name = f"at equal {what} bytes: {_title(*ours)} - {_title(*theirs)} (nats/token)"
                figures += paired(losses[ours], losses[theirs]).figures(name, 0.0)
    return figures


def _title(name: str, num_experts: tuple[int, int]) -> str:
    return f"{name}, {math.prod(num_experts):,} experts"
