"""What training in int4 costs in loss, beside other storages, rules, buffers and sizes.

The recipe is the quickstart. The learning rate of the pools is tuned for every storage and rule at
a third of the length; that of everything else for int4, which all row-wise rules share, and for
float32 under AdamW. Then every arm trains at full length from the same seeds, and is compared seed
by seed.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.int4_quality_plots import plot
from benchmarks.protocol import (
    EVALUATION,
    OF_POOLS,
    QUICK_STEPS,
    RECIPE,
    SEEDS,
    SHARED,
    START,
    STEPS,
)
from benchmarks.result import Figure, Result
from benchmarks.sweep import Settings, at_once, from_seeds, paired, train, tune_rates
from pallas_kernels.expert_update import UpdateState
from peerjax.pool import initialize_pool, memory_report

WIDTH, LONG_STEPS = 128, 10_000
TENTH = 0.1  # of the best learning rate: steps small enough to need a buffer, if any are

INT4, FLOAT32, ADAMW, BFLOAT16, INT8, ECO = (
    "int4", "float32", "float32, AdamW", "bfloat16", "int8", "int4, ECO",
)  # fmt: skip
ARMS: dict[str, Settings] = {
    INT4: {"pool.storage": "int4"},
    FLOAT32: {"pool.storage": "float32"},
    ADAMW: {"pool.storage": "float32", "pool.rule": "adamw"},
    BFLOAT16: {"pool.storage": "bfloat16"},
    INT8: {"pool.storage": "int8"},
    ECO: {"pool.storage": "int4", "pool.rule": "eco"},
}
BUFFERS = (0, 2, 4, 8)
SMALL, MIDDLE, DOUBLE, LARGE = (128, 128), (256, 256), (256, 512), (512, 512)
# Storages at other numbers of experts than the quickstart's, which is the middle one.
SIZES = (
    (INT4, LARGE), (INT4, DOUBLE), (ADAMW, SMALL), (INT4, SMALL), (BFLOAT16, SMALL),
    (BFLOAT16, DOUBLE), (INT8, SMALL), (FLOAT32, SMALL),
)  # fmt: skip
SMALL_MODEL = "a small model"  # that can be trained for long
LONG: Settings = {
    "model.width": 64, "model.mlp_width": 256, "peer.num_experts": (64, 64),
    "peer.key_width": 32, "peer.query_norm": "batchnorm", "data.sequence_length": 128,
    "data.batch_size": 4,
    "eval.rows": 32, "checkpoint.every": 500,
}  # fmt: skip


def tuned(steps: int) -> dict[str, tuple[dict[str, float], Any]]:
    """The best learning rates of every arm, and all that were tried."""

    def of_arm(name: str, start: dict[str, float], **fixed: float) -> Any:
        best, tables = tune_rates(RECIPE, {**EVALUATION, **ARMS[name], **fixed}, start, steps)
        return {**fixed, **best}, tables

    both = [INT4, ADAMW]
    found = dict(zip(both, at_once([partial(of_arm, name, START) for name in both]), strict=True))
    shared = {SHARED: found[INT4][0][SHARED]}
    others = [name for name in ARMS if name not in both]
    start = {OF_POOLS: found[INT4][0][OF_POOLS]}
    jobs = [partial(of_arm, name, start, **shared) for name in others]
    return found | dict(zip(others, at_once(jobs), strict=True))


def bytes_of(name: str, num_experts: tuple[int, int]) -> tuple[int, int]:
    """Bytes of a layer's experts: in inference, and in training with dense gradients, if any."""
    storage, count = ARMS[name]["pool.storage"], math.prod(num_experts)
    pool = jax.eval_shape(
        lambda: initialize_pool(jax.random.key(0), 1, count, WIDTH, storage=storage)
    )
    kept = memory_report(pool).kept
    if ARMS[name].get("pool.rule") == "adamw":
        return kept, 4 * kept  # gradient, two moments
    return kept, memory_report(pool, jax.eval_shape(UpdateState.zeros_for, pool)).kept


def run(quick: bool) -> Result:
    """Trains what no earlier call trained."""
    steps, seeds = (QUICK_STEPS, SEEDS[:2]) if quick else (STEPS, SEEDS)
    long_steps = QUICK_STEPS if quick else LONG_STEPS
    tuning = tuned(steps)
    rates = {name: best for name, (best, _) in tuning.items()}
    arms = {
        name: {**EVALUATION, **settings, **rates[name], "steps": steps}
        for name, settings in ARMS.items()
    }
    sizes = {
        (name, root): {**arms[name], "peer.num_experts": root}
        for name, root in (SIZES[:1] if quick else SIZES)
    }
    buffers = with_buffers(arms, long_steps)
    found = {
        key: [each.nats_per_token for each in runs]
        for key, runs in from_seeds(RECIPE, arms | sizes | buffers, seeds).items()
    }
    long_run = {
        **arms[INT4], **LONG, "steps": long_steps, "eval.every": max(1, long_steps // 40),
        "seed": seeds[0],
    }  # fmt: skip
    long = train(RECIPE, long_run, keep_series=True)
    sizes |= {(name, MIDDLE): arms[name] for name in ARMS if name != ECO}
    found |= {(name, MIDDLE): found[name] for name in ARMS}
    details = {
        "steps": steps,
        "rates": rates,
        "tuning": {name: tables for name, (_, tables) in tuning.items()},
        "storages": {name: found[name] for name in ARMS},
        "buffers": {", ".join(key): found[key] for key in buffers},
        "sizes": [
            {
                "pools": name,
                "experts": math.prod(root),
                "bytes": bytes_of(name, root),
                "losses": found[name, root],
            }
            for name, root in sizes
        ],
        "long_run": long.series,
    }
    if not quick:
        plot(details)
    return Result(
        columns=("pools", "learning rate", "nats/token", "beyond int4"),
        rows=[
            *(_against(name, arms[name], found[name], found[INT4]) for name in ARMS),
            *(
                _against(", ".join(key), each, found[key], found[(*key[:2], _bits(4))])
                for key, each in buffers.items()
            ),
            *(
                _against(f"{key[0]}, {math.prod(key[1]):,} experts", each, found[key], found[INT4])
                for key, each in sizes.items()
                if key[1] != MIDDLE
            ),
        ],
        figures=_figures(found),
        details=details,
    )


def with_buffers(
    arms: dict[str, Settings], long_steps: int
) -> dict[tuple[str, str, str], Settings]:
    """Accumulators of every width, and ECO: at the best rate, at a tenth, and there for long."""
    found = {}
    for model, at, factor, more in (
        (RECIPE, "best rate", 1, {}),
        (RECIPE, "a tenth of it", TENTH, {}),
        (
            SMALL_MODEL,
            "a tenth of it",
            TENTH,
            {**LONG, "steps": long_steps, "eval.every": long_steps},
        ),
    ):
        ours, eco = (
            {**arms[name], OF_POOLS: arms[name][OF_POOLS] * factor, **more} for name in (INT4, ECO)
        )
        for bits in BUFFERS:
            found[model, at, _bits(bits)] = ours | (
                {} if bits == 4 else {"pool.accumulator_bits": bits}
            )
        found[model, at, ECO] = eco
    return found


def _bits(count: int) -> str:
    return f"{count} bits"


def _against(name: str, arm: Settings, found: list[float], ours: list[float]) -> list[str]:
    return [
        name,
        f"{arm[OF_POOLS]:g}",
        f"{np.mean(found):.4f}",
        str(paired(found, ours)),
    ]


def _figures(found: Mapping[Any, list[float]]) -> list[Figure]:
    against_floats = paired(found[INT4], found[FLOAT32])
    figures = [
        Figure.at_most(
            "int4 beyond float32 pools, upper end of the 95% interval, share of the loss",
            (against_floats.mean + against_floats.half_width) / float(np.mean(found[FLOAT32])),
            0.005,
        ),
        Figure.at_most(
            "int4 - float32 under AdamW (nats/token)",
            paired(found[INT4], found[ADAMW]).mean,
            0.0,
        ),
    ]
    for what, ours, theirs in (
        ("inference bytes: int4, 262,144 - bfloat16, 65,536", LARGE, (BFLOAT16, MIDDLE)),
        (
            "training bytes: int4, 131,072 - bfloat16 row-wise, 65,536",
            DOUBLE,
            (BFLOAT16, MIDDLE),
        ),
        ("training bytes: int4, 262,144 - float32 under AdamW, 16,384", LARGE, (ADAMW, SMALL)),
    ):
        if (INT4, ours) in found and theirs in found:
            difference = paired(found[INT4, ours], found[theirs])
            figures += difference.figures(f"at equal {what} experts", 0.0)
    return figures
