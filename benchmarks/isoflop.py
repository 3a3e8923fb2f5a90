"""Compares dense layers, mixtures and pools at equal forward FLOPs a token and equal tokens.

The recipe is the quickstart, at two widths. At each width, the hidden widths of the dense model and
of the mixture are chosen so that their FLOPs a token equal those of PEER. Every learning rate of
every arm is tuned at a third of the length. Then all arms train at full length from the same seeds,
and are compared with the dense model seed by seed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

from benchmarks.equal_flops import (
    LARGEST_MISMATCH,
    Arm,
    Trained,
    arm_of,
    flops_of,
    mismatch,
    tune_and_train,
    with_flops,
)
from benchmarks.protocol import (
    EVALUATION,
    OF_POOLS,
    QUICK_STEPS,
    SEEDS,
    SHARED,
    START,
    START_WITHOUT_POOLS,
    STEPS,
)
from benchmarks.result import REPOSITORY, Figure, Result
from benchmarks.sweep import ROOT, Settings, paired

SIZES: dict[str, Settings] = {
    "D=64": {
        "model.width": 64, "mlp.hidden": 256, "peer.num_experts": (128, 128),
        "peer.key_width": 32,
    },
    "D=128": {},
}  # fmt: skip
DENSE, MOE, PEER, PEER_INT4 = "dense", "mixture", "PEER, float32", "PEER, int4"
MODELS: dict[str, Settings] = {
    DENSE: {"model.layers": (("dense", 4),)},
    MOE: {"model.layers": (("dense", 1), ("moe", 2), ("dense", 1)), "moe.num_experts": 32},
    PEER: {"pool.storage": "float32"},
    PEER_INT4: {"pool.storage": "int4"},
}
QUICK: Settings = {"data.sequence_length": 64, "eval.rows": 4}
# The field that is chosen so that FLOPs are equal.
ADJUSTED = {DENSE: "mlp.hidden", MOE: "moe.hidden"}


def arms(quick: bool = False) -> dict[tuple[str, str], Arm]:
    """Returns every model at every size.

    With `quick`, returns one model of each kind at the smallest size, on short rows.
    """
    more, found = QUICK if quick else {}, {}
    for size in list(SIZES)[: 1 if quick else None]:
        fields = {**EVALUATION, **SIZES[size], **more}
        wanted = flops_of(fields)
        for name in (DENSE, MOE, PEER_INT4) if quick else MODELS:
            settings = {**fields, **MODELS[name]}
            if name in ADJUSTED:
                settings = with_flops(settings, ADJUSTED[name], wanted)
            found[size, name] = arm_of(settings)
    return found


def run(quick: bool) -> Result:
    """Trains all arms that no earlier call trained, and compares them."""
    steps, seeds = (QUICK_STEPS, SEEDS[:2]) if quick else (STEPS, SEEDS)
    every = arms(quick)
    starts = {
        (size, name): START if arm.expert_parameters else START_WITHOUT_POOLS
        for (size, name), arm in every.items()
    }
    trained = tune_and_train(every, starts, steps, seeds)
    models = [
        {
            "size": size,
            "model": name,
            **arm._asdict(),
            "rates": trained[size, name].rates,
            "tuning": trained[size, name].tuning,
            "losses": trained[size, name].losses,
        }
        for (size, name), arm in every.items()
    ]
    plot(models, ROOT / "isoflop" if quick else REPOSITORY / "docs" / "isoflop")
    return Result(
        columns=(
            "size", "model", "MFLOPs a token", "parameters", "in pools", "rate", "of pools",
            "nats/token", "beyond dense",
        ),
        rows=[
            _row(size, name, arm, trained[size, name], trained[size, DENSE].losses)
            for (size, name), arm in every.items()
        ],
        figures=_figures(every, trained),
        details={"steps": steps, "models": models},
    )  # fmt: skip


def _row(size: str, name: str, arm: Arm, trained: Trained, of_dense: Sequence[float]) -> list[str]:
    return [
        size,
        name,
        f"{arm.flops / 1e6:.3f}",
        f"{arm.parameters:,}",
        f"{arm.expert_parameters:,}",
        f"{trained.rates[SHARED]:g}",
        f"{trained.rates[OF_POOLS]:g}" if OF_POOLS in trained.rates else "-",
        f"{np.mean(trained.losses):.4f}",
        str(paired(trained.losses, of_dense)),
    ]


def _figures(
    every: Mapping[tuple[str, str], Arm], trained: Mapping[tuple[str, str], Trained]
) -> list[Figure]:
    sizes = list(dict.fromkeys(size for size, _ in every))
    largest = max(mismatch([arm for (of, _), arm in every.items() if of == size]) for size in sizes)
    figures = [Figure.at_most("largest mismatch of FLOPs a token", largest, LARGEST_MISMATCH)]
    for size in sizes:
        for other in (DENSE, MOE, PEER):
            if (size, other) not in trained:
                continue
            difference = paired(trained[size, PEER_INT4].losses, trained[size, other].losses)
            what = f"{size}: int4 PEER - {other} (nats/token)"
            figures += difference.figures(what)
    return figures


def plot(models: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draws loss against FLOPs a token: the mean of each model, and every seed."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate(MODELS):
        of_model = [each for each in models if each["model"] == name]
        if not of_model:
            continue
        flops = [each["flops"] / 1e6 for each in of_model]
        means = [np.mean(each["losses"]) for each in of_model]
        axes.plot(flops, means, f"C{index}", marker="o", label=name)
        for place, each in zip(flops, of_model, strict=True):
            axes.plot([place] * len(each["losses"]), each["losses"], f"C{index}_", alpha=0.6)
    axes.set(xscale="log", xlabel="forward MFLOPs a token", ylabel="validation loss, nats/token")
    places = sorted({round(each["flops"] / 1e6, 2) for each in models})
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "loss_against_flops.png", dpi=100)
