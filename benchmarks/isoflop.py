"""Dense layers, mixtures and pools at equal forward FLOPs a token and equal tokens.

The recipe is the quickstart, at two widths. At each, hidden layers of the dense model and of the
mixture are as wide as makes their FLOPs a token those of PEER. Every learning rate of every arm is
tuned at a third of the length; then all train at full length from the same seeds, and are compared
with the dense model seed by seed.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import ml_collections
import numpy as np

from benchmarks.int4_quality import EVALUATION, OF_POOLS, RECIPE, SHARED, START
from benchmarks.result import REPOSITORY, Figure, Result
from benchmarks.sweep import ROOT, Settings, at_once, paired, tune_rates, validation_loss
from configs import quickstart
from peerjax.analysis.flops import forward_flops
from peerjax.config import model_config
from peerjax.data.tokenizer import Tokenizer
from peerjax.model import Decoder
from peerjax.pool import count_expert_parameters
from peerjax.training.checkpoint import count_parameters

STEPS, QUICK_STEPS = 500, 12
SEEDS = (0, 1, 2)
SIZES: dict[str, Settings] = {
    "D=64": {
        "model.width": 64, "model.mlp_width": 256, "peer.num_experts": (128, 128),
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
# The field that makes FLOPs equal.
ADJUSTED = {DENSE: "model.mlp_width", MOE: "moe.hidden"}
LARGEST_MISMATCH = 0.01


class Arm(NamedTuple):
    """One model of one size.

    Attributes:
        settings: fields that make it.
        flops: forward FLOPs a token.
        parameters: of all layers.
        expert_parameters: how many of them are in pools.
    """

    settings: Settings
    flops: float
    parameters: int
    expert_parameters: int


def config_of(settings: Settings) -> ml_collections.ConfigDict:
    """The recipe with other settings."""
    config = quickstart.get_config()
    config.update_from_flattened_dict(settings)
    return config


def flops_of(settings: Settings) -> float:
    """Forward FLOPs a token of the recipe with other settings."""
    config = config_of(settings)
    model = model_config(config, Tokenizer.load().vocab_size)
    return sum(forward_flops(model, config.data.sequence_length).values())


def with_flops(settings: Settings, field: str, wanted: float) -> Settings:
    """Settings whose FLOPs a token are as near those wanted as a whole number allows.

    Args:
        settings: fields that differ from the recipe.
        field: the one to choose; FLOPs grow linearly with it.
        wanted: FLOPs a token.

    Raises:
        ValueError: if no positive number comes within 1%.
    """
    one, two = (flops_of({**settings, field: value}) for value in (1, 2))
    found = {**settings, field: max(1, round(1 + (wanted - one) / (two - one)))}
    if abs(flops_of(found) / wanted - 1) > LARGEST_MISMATCH:
        raise ValueError(f"no {field} makes {wanted:g} FLOPs a token")
    return found


def arms(quick: bool = False) -> dict[tuple[str, str], Arm]:
    """Every model at every size; or one of each kind at the smallest, on short rows."""
    more, found = QUICK if quick else {}, {}
    for size in list(SIZES)[: 1 if quick else None]:
        fields = {**EVALUATION, **SIZES[size], **more}
        wanted = flops_of(fields)
        for name in (DENSE, MOE, PEER_INT4) if quick else MODELS:
            settings = {**fields, **MODELS[name]}
            if name in ADJUSTED:
                settings = with_flops(settings, ADJUSTED[name], wanted)
            found[size, name] = Arm(settings, flops_of(settings), *_parameters(settings))
    return found


def _parameters(settings: Settings) -> tuple[int, int]:
    model = Decoder(model_config(config_of(settings), Tokenizer.load().vocab_size))
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens, tokens)
    in_pools = count_expert_parameters(variables.get("pools", {}))
    return count_parameters(variables["params"]) + in_pools, in_pools


def _rates_of(name: str) -> dict[str, float]:
    """The learning rates that a model has, and where to begin."""
    return START if name in (PEER, PEER_INT4) else {SHARED: START[SHARED]}


def run(quick: bool) -> Result:
    """Trains what no earlier call trained."""
    steps, seeds = (QUICK_STEPS, SEEDS[:2]) if quick else (STEPS, SEEDS)
    every = arms(quick)
    tuning = at_once(
        [
            partial(tune_rates, RECIPE, arm.settings, _rates_of(name), steps)
            for (_, name), arm in every.items()
        ]
    )
    rates = dict(zip(every, (best for best, _ in tuning), strict=True))
    found = at_once(
        [
            partial(
                validation_loss,
                RECIPE,
                {**arm.settings, "steps": steps, **rates[key], "seed": seed},
            )
            for key, arm in every.items()
            for seed in seeds
        ]
    )
    losses = dict(zip(every, np.reshape(found, (-1, len(seeds))).tolist(), strict=True))
    models = [
        {
            "size": size,
            "model": name,
            **every[size, name]._asdict(),
            "rates": rates[size, name],
            "tuning": tables,
            "losses": losses[size, name],
        }
        for (size, name), (_, tables) in zip(every, tuning, strict=True)
    ]
    plot(models, ROOT / "isoflop" if quick else REPOSITORY / "docs" / "isoflop")
    return Result(
        columns=(
            "size", "model", "MFLOPs a token", "parameters", "in pools", "rate", "of pools",
            "nats/token", "beyond dense",
        ),
        rows=[
            _row(size, name, arm, rates[size, name], losses[size, name], losses[size, DENSE])
            for (size, name), arm in every.items()
        ],
        figures=_figures(every, losses),
        details={"steps": steps, "models": models},
    )  # fmt: skip


def _row(
    size: str,
    name: str,
    arm: Arm,
    rates: Mapping[str, float],
    losses: Sequence[float],
    of_dense: Sequence[float],
) -> list[str]:
    difference = paired(losses, of_dense)
    return [
        size,
        name,
        f"{arm.flops / 1e6:.3f}",
        f"{arm.parameters:,}",
        f"{arm.expert_parameters:,}",
        f"{rates[SHARED]:g}",
        f"{rates[OF_POOLS]:g}" if OF_POOLS in rates else "-",
        f"{np.mean(losses):.4f}",
        f"{difference.mean:+.4f} +- {difference.half_width:.4f}",
    ]


def _figures(
    every: Mapping[tuple[str, str], Arm], losses: Mapping[tuple[str, str], list[float]]
) -> list[Figure]:
    mismatch = max(
        abs(arm.flops / every[size, PEER_INT4].flops - 1) for (size, _), arm in every.items()
    )
    figures = [Figure.at_most("largest mismatch of FLOPs a token", mismatch, LARGEST_MISMATCH)]
    for size in dict.fromkeys(size for size, _ in every):
        for other in (DENSE, MOE):
            difference = paired(losses[size, PEER_INT4], losses[size, other])
            what = f"{size}: int4 PEER - {other} (nats/token)"
            figures.append(Figure(what, difference.mean))
            figures.append(Figure("half width of its 95% interval", difference.half_width))
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
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "loss_against_flops.png", dpi=100)
