"""What training in int4 costs in loss, beside other storages, rules, buffers and sizes.

The recipe is the quickstart. The learning rate of the pools is tuned for every storage and rule at
a third of the length; that of everything else for int4, which all row-wise rules share, and for
float32 under AdamW. Then every arm trains at full length from the same seeds, and is compared seed
by seed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

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
from benchmarks.sweep import Settings, at_once, paired, train, tune_rates, validation_loss
from pallas_kernels.expert_update import UpdateState
from peerjax.pool import initialize_pool, memory_report

WIDTH, LONG_STEPS = 128, 10_000
FEW, MANY = SEEDS, tuple(range(6))
TENTH = 0.1  # of the best learning rate: steps small enough to need a buffer, if any are


class Arm(NamedTuple):
    """One way to keep and move pools.

    Attributes:
        settings: fields that make it.
        seeds: what it is trained from.
    """

    settings: Settings
    seeds: Sequence[int] = FEW


INT4, FLOAT32, ADAMW, BFLOAT16, INT8, ECO = (
    "int4", "float32", "float32, AdamW", "bfloat16", "int8", "int4, ECO",
)  # fmt: skip
# The first three decide whether goals are reached: more seeds.
STORAGES = {
    INT4: Arm({"pool.storage": "int4"}, MANY),
    FLOAT32: Arm({"pool.storage": "float32"}, MANY),
    ADAMW: Arm({"pool.storage": "float32", "pool.rule": "adamw"}, MANY),
    BFLOAT16: Arm({"pool.storage": "bfloat16"}),
    INT8: Arm({"pool.storage": "int8"}),
    ECO: Arm({"pool.storage": "int4", "pool.rule": "eco"}),
}
BUFFERS = (0, 2, 4, 8)
SMALL, LARGE, DOUBLE = (128, 128), (512, 512), (256, 512)
# Storages at other numbers of experts than the quickstart's 256^2.
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


def tuned(arms: dict[str, Arm], steps: int) -> dict[str, tuple[dict[str, float], Any]]:
    """The best learning rates of every arm, and all that were tried."""

    def of_arm(name: str, start: dict[str, float], **fixed: float) -> Any:
        best, tables = tune_rates(
            RECIPE, {**EVALUATION, **arms[name].settings, **fixed}, start, steps
        )
        return {**fixed, **best}, tables

    both = [INT4, ADAMW]
    found = dict(zip(both, at_once([partial(of_arm, name, START) for name in both]), strict=True))
    shared = {SHARED: found[INT4][0][SHARED]}
    others = [name for name in arms if name not in both]
    start = {OF_POOLS: found[INT4][0][OF_POOLS]}
    jobs = [partial(of_arm, name, start, **shared) for name in others]
    return found | dict(zip(others, at_once(jobs), strict=True))


def losses(arm: Arm, rates: dict[str, float], steps: int, **more: Any) -> list[float]:
    """Validation losses by seed."""
    fields = {**EVALUATION, **arm.settings, "steps": steps, **rates, **more}
    return at_once(
        [partial(validation_loss, RECIPE, {**fields, "seed": seed}) for seed in arm.seeds]
    )


def bytes_of(arm: Arm, num_experts: tuple[int, int]) -> tuple[int, int]:
    """Bytes of a layer's experts: in inference, and in training with dense gradients, if any."""
    storage, count = arm.settings["pool.storage"], num_experts[0] * num_experts[1]
    pool = jax.eval_shape(
        lambda: initialize_pool(jax.random.key(0), 1, count, WIDTH, storage=storage)
    )
    kept = memory_report(pool).kept
    if arm.settings.get("pool.rule") == "adamw":
        return kept, 4 * kept  # gradient, two moments
    return kept, memory_report(pool, jax.eval_shape(UpdateState.zeros_for, pool)).kept


def run(quick: bool) -> Result:
    """Trains what no earlier call trained."""
    steps = QUICK_STEPS if quick else STEPS
    arms = {
        name: arm._replace(seeds=arm.seeds[:2]) if quick else arm for name, arm in STORAGES.items()
    }
    tuning = tuned(arms, steps)
    rates = {name: best for name, (best, _) in tuning.items()}
    storages = {name: losses(arm, rates[name], steps) for name, arm in arms.items()}
    sizes = {
        (name, root): losses(
            arms[name]._replace(seeds=arms[name].seeds[: len(FEW)]),
            rates[name],
            steps,
            **{"peer.num_experts": root},
        )
        for name, root in (SIZES[:1] if quick else SIZES)
    }
    sizes |= {(name, (256, 256)): found for name, found in storages.items() if name != ECO}
    long_steps = QUICK_STEPS if quick else LONG_STEPS
    long_run = {**LONG, **rates[INT4], "eval.every": max(1, long_steps // 40)}
    long = train(RECIPE, {**long_run, "steps": long_steps, "seed": 0}, keep_series=True)
    buffers = _buffers(arms, rates, steps, long_steps)
    details = {
        "steps": steps,
        "rates": rates,
        "tuning": {name: tables for name, (_, tables) in tuning.items()},
        "storages": storages,
        "buffers": {
            f"{model}, {rate:g}, {name}": found for (model, rate, name), found in buffers.items()
        },
        "sizes": [
            {
                "pools": name,
                "experts": root[0] * root[1],
                "bytes": bytes_of(arms[name], root),
                "losses": found,
            }
            for (name, root), found in sizes.items()
        ],
        "long_run": long.series,
    }
    if not quick:
        plot(details)
    return Result(
        columns=("pools", "learning rate", "nats/token", "beyond int4", "seeds"),
        rows=[
            *(
                _against(name, rates[name][OF_POOLS], each, storages[INT4])
                for name, each in storages.items()
            ),
            *(
                _against(f"{model}, int4, {name}", rate, each, buffers[model, rate, "4 bits"])
                for (model, rate, name), each in buffers.items()
            ),
            *(
                _against(
                    f"{name}, {root[0] * root[1]:,} experts",
                    rates[name][OF_POOLS],
                    each,
                    storages[INT4],
                )
                for (name, root), each in sizes.items()
                if root != (256, 256)
            ),
        ],
        figures=_figures(storages, sizes),
        details=details,
    )


def _buffers(
    arms: dict[str, Arm], rates: dict[str, dict[str, float]], steps: int, long_steps: int
) -> dict[tuple[str, float, str], list[float]]:
    """Losses by model, learning rate and buffer: at the best, at a tenth, and there for long."""
    found = {}
    for model, length, factor, more in (
        (RECIPE, steps, 1, {}),
        (RECIPE, steps, TENTH, {}),
        (SMALL_MODEL, long_steps, TENTH, {**LONG, "eval.every": long_steps}),
    ):
        ours, eco = (
            {**rates[name], OF_POOLS: rates[name][OF_POOLS] * factor} for name in (INT4, ECO)
        )
        few = arms[INT4]._replace(seeds=arms[INT4].seeds[: len(FEW)])
        for bits in BUFFERS:
            buffer = {} if bits == 4 else {"pool.accumulator_bits": bits}
            key = model, ours[OF_POOLS], f"{bits} bits"
            found[key] = losses(few, ours, length, **buffer, **more)
        found[model, ours[OF_POOLS], f"ECO at {eco[OF_POOLS]:g}"] = losses(
            arms[ECO], eco, length, **more
        )
    return found


def _against(name: str, rate: float, found: list[float], ours: list[float]) -> list[str]:
    count = min(len(found), len(ours))
    mean, half_width = paired(found[:count], ours[:count])
    average = sum(found) / len(found)
    return [
        name,
        f"{rate:g}",
        f"{average:.4f}",
        f"{mean:+.4f} +- {half_width:.4f}",
        str(len(found)),
    ]


def _figures(storages: dict[str, list[float]], sizes: dict[Any, list[float]]) -> list[Figure]:
    floats = storages[FLOAT32]
    against_floats = paired(storages[INT4], floats)
    figures = [
        Figure.at_most(
            "int4 beyond float32 pools, upper end of the 95% interval, share of the loss",
            (against_floats.mean + against_floats.half_width) / (sum(floats) / len(floats)),
            0.005,
        ),
        Figure.at_most(
            "int4 - float32 under AdamW (nats/token)",
            paired(storages[INT4], storages[ADAMW]).mean,
            0.0,
        ),
    ]
    for what, ours, theirs in (
        ("inference bytes: int4, 262,144 - bfloat16, 65,536", LARGE, (BFLOAT16, (256, 256))),
        (
            "training bytes: int4, 131,072 - bfloat16 row-wise, 65,536",
            DOUBLE,
            (BFLOAT16, (256, 256)),
        ),
        ("training bytes: int4, 262,144 - float32 under AdamW, 16,384", LARGE, (ADAMW, SMALL)),
    ):
        if (INT4, ours) in sizes and theirs in sizes:
            count = min(len(sizes[INT4, ours]), len(sizes[theirs]))
            difference = paired(sizes[INT4, ours][:count], sizes[theirs][:count])
            figures.append(Figure.at_most(f"at equal {what} experts", difference.mean, 0.0))
            figures.append(Figure("half width of its 95% interval", difference.half_width))
    return figures
