"""Storages and update rules to compare: their settings, learning rates and table rows."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.protocol import EVALUATION, OF_POOLS, RECIPE, SHARED, START
from benchmarks.sweep import Settings, at_once, paired, tune_rates

INT4, FLOAT32, ADAMW, ADAMW_SHARED, BFLOAT16, INT8, ECO = (
    "int4", "float32", "float32, AdamW", "float32, AdamW, the shared rate of int4", "bfloat16",
    "int8", "int4, ECO",
)  # fmt: skip
COLUMNS = ("pools", "learning rate", "nats/token", "beyond int4")
ARMS: dict[str, Settings] = {
    INT4: {"pool.storage": "int4"},
    FLOAT32: {"pool.storage": "float32"},
    ADAMW: {"pool.storage": "float32", "pool.rule": "adamw"},
    # At a third of the length, AdamW's shared rates hardly differ, so both train at full length.
    ADAMW_SHARED: {"pool.storage": "float32", "pool.rule": "adamw"},
    BFLOAT16: {"pool.storage": "bfloat16"},
    INT8: {"pool.storage": "int8"},
    ECO: {"pool.storage": "int4", "pool.rule": "eco"},
}


def tuned(steps: int) -> dict[str, tuple[dict[str, float], Any]]:
    """Returns the best learning rates of every arm, and all rates that were tried.

    The rate of the pools is tuned for every arm. The shared rate, that of everything else, is tuned
    for int4 and for float32 with AdamW. The other arms use the shared rate of int4.
    """

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


def at_best_rates(
    tuning: dict[str, tuple[dict[str, float], Any]], steps: int
) -> dict[str, Settings]:
    """Returns the settings of every arm at its best rates and full length."""
    return {
        name: {**EVALUATION, **settings, **tuning[name][0], "steps": steps}
        for name, settings in ARMS.items()
    }


def against(
    name: str, settings: Settings, losses: Sequence[float], of_int4: Sequence[float]
) -> list[str]:
    """Returns a row of the table."""
    return [
        name,
        f"{settings[OF_POOLS]:g}",
        f"{np.mean(losses):.4f}",
        str(paired(losses, of_int4)),
    ]
