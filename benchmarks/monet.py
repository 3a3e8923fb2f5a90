"""Monet, horizontal and vertical, beside PEER, at equal forward FLOPs a token and equal tokens.

The recipe is the quickstart, whose two PEER layers are replaced. Every learning rate of every arm
is tuned at a third of the length. Then each trains from the same seeds for the same steps, and is
compared with the PEER that keeps its experts alike. Monet as published, in float32, trains once
more for as many steps as take the time that PEER's take.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import short_run
from benchmarks.equal_flops import (
    LARGEST_MISMATCH,
    Arm,
    arm_of,
    mismatch,
    tune_and_train,
)
from benchmarks.protocol import (
    EVALUATION,
    OF_POOLS,
    QUICK_STEPS,
    RECIPE,
    SEEDS,
    SHARED,
    START,
    START_WITHOUT_POOLS,
    STEPS,
)
from benchmarks.result import Figure, Result
from benchmarks.sweep import Settings, from_seeds, paired
from peerjax.data.pipeline import load_corpus, train_batches
from peerjax.inference.trained import open_run, restore
from peerjax.model import MONET_HD, MONET_VD
from peerjax.sharding import make_mesh
from peerjax.training.evaluation import put_batch
from peerjax.training.gradients import loss_and_gradients

TIMED_STEPS = 40
SAME_TIME = "losses_in_the_same_time"
Models = Mapping[str, Mapping[str, Any]]
PEER, HD, VD = "PEER, float32", "Monet HD, float32", "Monet VD, float32"
PEER_INT4, HD_INT4, VD_INT4 = "PEER, int4", "Monet HD, int4", "Monet VD, int4"


def _monet(kind: str, storage: str) -> Settings:
    """As many keys a side as make the FLOPs of PEER; k is about a sixteenth, as in the paper."""
    return {
        "model.layers": (("dense", 1), (kind, 2), ("dense", 1)),
        "monet.num_experts": 120**2,
        "monet.expert_width": 4,
        "monet.heads": 4,
        "monet.top_k": 8,
        "monet.group": 2,
        "monet.storage": storage,
    }


MODELS = {
    PEER: {"pool.storage": "float32"},
    HD: _monet(MONET_HD, "float32"),
    VD: _monet(MONET_VD, "float32"),
    PEER_INT4: {"pool.storage": "int4"},
    HD_INT4: _monet(MONET_HD, "int4"),
    VD_INT4: _monet(MONET_VD, "int4"),
}

# What the losses of a model are compared with: the PEER that keeps its experts alike, and the same
# Monet in float32.
RIVALS = {HD: PEER, VD: PEER, HD_INT4: PEER_INT4, VD_INT4: PEER_INT4}
UNPACKED = {HD_INT4: HD, VD_INT4: VD}


def arm_named(name: str) -> Arm:
    """One of the models."""
    return arm_of({**EVALUATION, **MODELS[name]})


def start_of(name: str) -> dict[str, float]:
    """The learning rates that a model has, and where to begin."""
    if name in (HD, VD):
        return START_WITHOUT_POOLS
    # Halves are dense matrices: packed, they begin at the rate that such have.
    return {**START, OF_POOLS: START[SHARED]} if name in (HD_INT4, VD_INT4) else START


def run(quick: bool) -> Result:
    """Trains what no earlier call trained, and times every arm by itself."""
    steps, seeds = (QUICK_STEPS, SEEDS[:2]) if quick else (STEPS, SEEDS)
    arms = {name: arm_named(name) for name in ((PEER, HD) if quick else MODELS)}
    trained = tune_and_train(arms, {name: start_of(name) for name in arms}, steps, seeds)
    timed = {name: measure(arm, 4 if quick else TIMED_STEPS) for name, arm in arms.items()}
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
    """How many steps one model takes while another takes `steps`, to the nearest tenth of these.

    Timings are no finer, and lengths that changed with each would train everything again.
    """
    tenths = round(10 * of["seconds_per_step"] / by["seconds_per_step"])
    return max(1, tenths * steps // 10)


def measure(arm: Arm, steps: int) -> dict[str, Any]:
    """Step time and memory of training by itself, and how sparse the gradient is after it."""
    found = short_run.train(RECIPE, steps, {**arm.settings, "eval.rows": 8}, gradient_share)
    return {"gradient_share": found.pop("found"), **found}


def gradient_share(workdir: str) -> float:
    """The share of expert parameters whose gradient on one batch is not 0."""
    run, mesh = open_run(workdir), make_mesh()
    batch = next(train_batches(run.config, load_corpus(run.config).train, run.step))
    with jax.set_mesh(mesh):
        variables = restore(run, mesh)
        differentiate = jax.jit(partial(loss_and_gradients, run.model))
        _, gradients = differentiate(variables, put_batch(mesh, batch))
    leaves = jax.tree_util.tree_leaves_with_path(gradients.params)
    experts = [leaf for path, leaf in leaves if "'monet'" in jax.tree_util.keystr(path)]
    for name, factored in gradients.pools.items():
        experts.append(factored.dense(variables["pools"][name]["pool"].num_experts))
    return sum(int(np.count_nonzero(each)) for each in experts) / sum(each.size for each in experts)


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
