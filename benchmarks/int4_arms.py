"""Storages and update rules that are compared, the learning rates of each, and how it is told."""

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
    # A third of the length hardly tells AdamW's shared rates apart: both go to full length.
    ADAMW_SHARED: {"pool.storage": "float32", "pool.rule": "adamw"},
    BFLOAT16: {"pool.storage": "bfloat16"},
    INT8: {"pool.storage": "int8"},
    ECO: {"pool.storage": "int4", "pool.rule": "eco"},
}


def tuned(steps: int) -> dict[str, tuple[dict[str, float], Any]]:
    """The best learning rates of every arm, and all that were tried.

    That of the pools is tuned for every arm; that of everything else, the shared one, for int4,
    whose value the others take, and for float32 under AdamW.
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
    """Every arm at full length."""
    return {
        name: {**EVALUATION, **settings, **tuning[name][0], "steps": steps}
        for name, settings in ARMS.items()
    }


def against(
    name: str, settings: Settings, losses: Sequence[float], of_int4: Sequence[float]
) -> list[str]:
    """A row of the table."""
    return [
        name,
        f"{settings[OF_POOLS]:g}",
        f"{np.mean(losses):.4f}",
        str(paired(losses, of_int4)),
    ]
