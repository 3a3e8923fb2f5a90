"""What training in int4 costs in loss, beside other storages, rules and buffers.

The recipe is the quickstart. The learning rate of the pools is tuned for every arm at a third of
the length; that of everything else is the one that the `quickstart` benchmark found best for int4
and for float32 under AdamW alike. Then every arm trains at full length from the same seeds.
"""

from functools import partial
from typing import NamedTuple

from benchmarks.result import Figure, Result
from benchmarks.sweep import Settings, at_once, paired, tune, validation_loss

RECIPE = "quickstart"
STEPS, QUICK_STEPS = 500, 12
SEEDS = tuple(range(8))
# Enough rows that the error of the validation loss itself does not matter.
EVALUATION: Settings = {"eval.rows": 96, "eval.every": 500, "checkpoint.every": 250}


class Arm(NamedTuple):
    """One way to keep and move pools.

    Attributes:
        name: for people.
        settings: fields that make it.
        start: where tuning of the pools' learning rate begins.
        seeds: how many seeds it is trained from.
    """

    name: str
    settings: Settings
    start: float = 1e-2
    seeds: int = 3


ADAMW, FLOAT32, INT4 = "float32, AdamW", "float32", "int4"
STORAGES = (
    Arm(INT4, {"pool.storage": "int4"}, seeds=8),
    Arm(FLOAT32, {"pool.storage": "float32"}, seeds=8),
    Arm(ADAMW, {"pool.storage": "float32", "pool.rule": "adamw"}, seeds=8),
    Arm("bfloat16", {"pool.storage": "bfloat16"}),
    Arm("int8", {"pool.storage": "int8"}),
)


class Trained(NamedTuple):
    """What an arm found: its best learning rate, how it was tuned, losses by seed."""

    learning_rate: float
    tuning: list[tuple[float, float]]
    losses: list[float]


def train_arm(arm: Arm, steps: int) -> Trained:
    """Tunes an arm and trains it from its seeds."""
    base = {**EVALUATION, **arm.settings}

    def tuning_loss(rate: float) -> float:
        short = {"steps": steps // 3, "optimizer.warmup_steps": steps // 9, "seed": 0}
        return validation_loss(RECIPE, {**base, **short, "pool.learning_rate": rate})

    rate, tuning = tune(tuning_loss, arm.start)
    best = {**base, "steps": steps, "pool.learning_rate": rate}
    losses = [validation_loss(RECIPE, {**best, "seed": seed}) for seed in SEEDS[: arm.seeds]]
    return Trained(rate, tuning, losses)


def run(quick: bool) -> Result:
    """Trains what no earlier call trained."""
    steps = QUICK_STEPS if quick else STEPS
    arms = [arm._replace(seeds=2) if quick else arm for arm in STORAGES]
    found = dict(
        zip(
            [arm.name for arm in arms],
            at_once([partial(train_arm, arm, steps) for arm in arms]),
            strict=True,
        )
    )
    ours, floats = found[INT4], found[FLOAT32]
    rows = []
    for name, each in found.items():
        count = min(len(each.losses), len(ours.losses))
        mean, half_width = paired(each.losses[:count], ours.losses[:count])
        rows.append(
            [name, f"{each.learning_rate:g}", f"{sum(each.losses) / len(each.losses):.4f}",
             f"{mean:+.4f} +- {half_width:.4f}", str(count)]
        )  # fmt: skip
    loss = sum(floats.losses) / len(floats.losses)
    against_floats, against_adamw = (
        paired(ours.losses, found[name].losses) for name in (FLOAT32, ADAMW)
    )
    return Result(
        columns=("pools", "learning rate", "nats/token", "beyond int4", "seeds"),
        rows=rows,
        figures=[
            Figure.at_most(
                "int4 beyond float32 pools, upper end of the 95% interval, share of the loss",
                (against_floats.mean + against_floats.half_width) / loss,
                0.005,
            ),
            Figure.at_most("int4 - float32 under AdamW (nats/token)", against_adamw.mean, 0.0),
        ],
        details={"steps": steps, "storages": {n: each._asdict() for n, each in found.items()}},
    )
