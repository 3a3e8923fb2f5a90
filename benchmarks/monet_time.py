"""Measures time, memory and gradient sparsity of a training step of Monet and of PEER.

Nothing else may run on the machine. Its speed drifts, so the models are measured in turns. The time
of each model is the median of its turns.
"""

from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import short_run
from benchmarks.equal_flops import Arm
from benchmarks.monet_models import HD, MODELS, PEER, arm_named
from benchmarks.protocol import RECIPE
from benchmarks.result import Result
from peerjax.data.pipeline import load_corpus, train_batches
from peerjax.inference.trained import open_run, restore
from peerjax.objectives import language_model
from peerjax.sharding import make_mesh
from peerjax.sharding.batches import put_batch
from peerjax.training.gradients import loss_and_gradients

STEPS, TURNS = 40, 3


def run(quick: bool) -> Result:
    """Times every model."""
    names, steps, turns = ((PEER, HD), 4, 1) if quick else (tuple(MODELS), STEPS, TURNS)
    arms = {name: arm_named(name) for name in names}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(turns):
        for name, arm in arms.items():
            found[name].append(measure(arm, steps))
    models = {name: _summary(each) for name, each in found.items()}
    return Result(
        columns=("model", "with gradient", "ms a step", "fastest", "slowest", "peak GB"),
        rows=[
            [
                name,
                f"{model['gradient_share']:.1%}",
                *(
                    f"{1e3 * seconds:.0f}"
                    for seconds in (
                        model["seconds_per_step"], min(model["turns"]), max(model["turns"]),
                    )
                ),
                f"{model['peak_bytes'] / 1e9:.2f}",
            ]
            for name, model in models.items()
        ],
        figures=[],
        details={"steps": steps, "models": models},
    )  # fmt: skip


def _summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [turn["seconds_per_step"] for turn in turns]
    return {
        "gradient_share": turns[0]["gradient_share"],  # the same in every turn
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
        "seconds_per_step": float(np.median(seconds)),
        "turns": seconds,
    }


def measure(arm: Arm, steps: int) -> dict[str, Any]:
    """Returns step time and memory of a short run, and the gradient's sparsity after it."""
    found = short_run.train(RECIPE, steps, {**arm.settings, "eval.rows": 8}, gradient_share)
    return {"gradient_share": found.pop("found"), **found}


def gradient_share(workdir: str) -> float:
    """Returns the share of expert parameters whose gradient on one batch is not 0."""
    run, mesh = open_run(workdir), make_mesh()
    batch = next(train_batches(run.config, load_corpus(run.config).train, run.step))
    with jax.set_mesh(mesh):
        variables = restore(run, mesh)
        differentiate = jax.jit(
            partial(loss_and_gradients, language_model(run.config, run.model.config.vocab_size))
        )
        _, gradients = differentiate(variables, put_batch(mesh, batch))
    leaves = jax.tree_util.tree_leaves_with_path(gradients.params)
    experts = [leaf for path, leaf in leaves if "'monet'" in jax.tree_util.keystr(path)]
    for stack, of_stack in gradients.pools.items():
        for name, factored in of_stack.items():
            experts.append(factored.dense(variables["pools"][stack][name].num_experts))
    return sum(int(np.count_nonzero(each)) for each in experts) / sum(each.size for each in experts)
