"""Does the quickstart lose anything by its int4 pools? Against float32 pools under AdamW.

Both learning rates of both sides are tuned one after the other, at a third of the length; then the
best of each trains at full length from three seeds, paired.
"""

from functools import partial
from typing import Any

from benchmarks.result import Figure, Result
from benchmarks.sweep import Settings, paired, tune, validation_loss

RECIPE = "quickstart"
SEEDS = (0, 1, 2)
# Enough rows that the error of the validation loss itself does not matter.
EVALUATION: Settings = {"eval.rows": 96, "eval.every": 500, "checkpoint.every": 250}
ARMS: dict[str, Settings] = {
    "int4": {"pool.storage": "int4", "pool.rule": "rowwise", "pool.learning_rate": 1e-2},
    "float32 + AdamW": {
        "pool.storage": "float32",
        "pool.rule": "adamw",
        "pool.learning_rate": 3e-3,
    },
}


def run(quick: bool) -> Result:
    """Tunes and trains both arms."""
    steps, tuning_steps = (30, 10) if quick else (500, 166)
    seeds = SEEDS[:2] if quick else SEEDS
    details: dict[str, Any] = {"steps": steps, "tuning_steps": tuning_steps, "seeds": seeds}
    losses, rows = {}, []
    for arm, fixed in ARMS.items():
        settings = {**EVALUATION, **fixed, "optimizer.learning_rate": 3e-3}
        tuning = {}
        for field in ("optimizer.learning_rate", "pool.learning_rate"):
            loss_of = partial(_tuning_loss, settings, tuning_steps, field)
            settings[field], tuning[field] = tune(loss_of, settings[field])
        losses[arm] = [
            validation_loss(RECIPE, {**settings, "steps": steps, "seed": seed}) for seed in seeds
        ]
        details[arm] = {"settings": settings, "tuning": tuning, "losses": losses[arm]}
        mean = sum(losses[arm]) / len(seeds)
        rates = (f"{settings[field]:g}" for field in tuning)
        rows.append([arm, *rates, f"{mean:.4f}", " ".join(f"{loss:.4f}" for loss in losses[arm])])
    packed, floats = (losses[arm] for arm in ARMS)
    difference = paired(packed, floats)
    details["difference"] = difference._asdict()
    return Result(
        columns=("pools", "learning rate", "of pools", "nats/token", "by seed"),
        rows=rows,
        figures=[
            Figure.at_most("int4 - float32 + AdamW (nats/token)", difference.mean, 0.0),
            Figure("half width of its 95% interval", difference.half_width),
        ],
        details=details,
    )


def _tuning_loss(settings: Settings, steps: int, field: str, value: float) -> float:
    short = {"steps": steps, "optimizer.warmup_steps": steps // 3, "seed": 0}
    return validation_loss(RECIPE, {**settings, **short, field: value})
