"""Compares horizontal and vertical Monet with PEER at equal forward FLOPs a token.

The number of tokens is equal too. Every learning rate of every model is tuned at a third of the
length. Then each model trains from the same seeds for the same steps, and is compared with the PEER
of the same storage. Monet as published, in float32, also trains for as many steps as fit into
PEER's time. The times of steps are those that `monet_time` measured.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.equal_flops import LARGEST_MISMATCH, mismatch, tune_and_train
from benchmarks.monet_models import (
    HD,
    HD_INT4,
    MODELS,
    PEER,
    PEER_INT4,
    VD,
    VD_INT4,
    arm_named,
    start_of,
)
from benchmarks.protocol import QUICK_STEPS, RECIPE, SEEDS, STEPS
from benchmarks.result import Figure, Result, published
from benchmarks.sweep import from_seeds, paired

SAME_TIME = "losses_in_the_same_time"
Models = Mapping[str, Mapping[str, Any]]

# Losses of a model are compared with those of the PEER of the same storage, and with those of the
# same Monet in float32.
RIVALS = {HD: PEER, VD: PEER, HD_INT4: PEER_INT4, VD_INT4: PEER_INT4}
UNPACKED = {HD_INT4: HD, VD_INT4: VD}


def run(quick: bool) -> Result:
    """Trains all models that no earlier call trained, and compares them.

    Raises:
        FileNotFoundError: if `monet_time` has no results.
    """
    timed = published("monet_time")["models"]
    steps, seeds = (QUICK_STEPS, SEEDS[:2]) if quick else (STEPS, SEEDS)
    arms = {name: arm_named(name) for name in ((PEER, HD) if quick else MODELS)}
    trained = tune_and_train(arms, {name: start_of(name) for name in arms}, steps, seeds)
    models = {
        name: {
            **arm._asdict(),
            **timed[name],
            "rates": trained[name].rates,
            "tuning": trained[name].tuning,
            "losses": trained[name].losses,
            "usage": trained[name].over_layers("usage"),
            "unevenness": trained[name].over_layers("unevenness"),
        }
        for name, arm in arms.items()
    }
    lengths = {
        name: steps_in_the_time(steps, timed[PEER], timed[name])
        for name in (HD, VD)
        if name in arms
    }
    same_time = {
        name: {**arms[name].settings, **trained[name].rates, "steps": length}
        for name, length in lengths.items()
    }
    for name, runs in from_seeds(RECIPE, same_time, seeds).items():
        models[name] |= {
            "steps_in_the_same_time": lengths[name],
            SAME_TIME: [run.nats_per_token for run in runs],
        }
    return Result(
        columns=(
            "model", "parameters", "nats/token", "beyond PEER", "in the same time", "experts used",
            "unevenness", "with gradient", "ms a step", "peak GB",
        ),
        rows=[_row(name, models) for name in models],
        figures=[
            Figure.at_most(
                "largest mismatch of FLOPs a token", mismatch(list(arms.values())), LARGEST_MISMATCH
            ),
            *_differences(models),
        ],
        details={"steps": steps, "models": models},
    )  # fmt: skip


def steps_in_the_time(steps: int, of: Mapping[str, Any], by: Mapping[str, Any]) -> int:
    """Returns how many steps `by` makes while `of` makes `steps`, to the nearest tenth of these."""
    tenths = round(10 * of["seconds_per_step"] / by["seconds_per_step"])
    return max(1, tenths * steps // 10)


def _differences(models: Models) -> list[Figure]:
    figures = []
    for name, other in (*RIVALS.items(), *UNPACKED.items()):
        if name in models:
            difference = paired(models[name]["losses"], models[other]["losses"])
            figures += difference.figures(f"{name} - {other}, the same tokens (nats/token)")
    for name, other in RIVALS.items():
        if SAME_TIME in models.get(name, {}):
            difference = paired(models[name][SAME_TIME], models[other]["losses"])
            figures += difference.figures(f"{name} - {other}, the same time (nats/token)")
    return figures


def _row(name: str, models: Models) -> list[str]:
    model = models[name]
    tokens, time = (
        str(paired(model[losses], models[RIVALS[name]]["losses"]))
        if name in RIVALS and losses in model
        else ""
        for losses in ("losses", SAME_TIME)
    )
    return [
        name,
        f"{model['parameters']:,}",
        f"{np.mean(model['losses']):.4f}",
        tokens,
        time,
        f"{model['usage']:.1%}",
        f"{model['unevenness']:.3f}",
        f"{model['gradient_share']:.1%}",
        f"{1e3 * model['seconds_per_step']:.0f}",
        f"{model['peak_bytes'] / 1e9:.2f}",
    ]
