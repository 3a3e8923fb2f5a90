"""Tests whether a shared path mends the attention sinks of models with sparse layers.

The claim has three parts: neither PEER nor Monet handles sinks well, a tied dense layer of 128
neurons beside them mends it, and experts that are always on do less. The arms are compared only
under a condition in which the arm without any remedy has sinks; see `benchmarks.sink_conditions`.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.protocol import QUICK_STEPS, SEEDS
from benchmarks.result import Figure, Result
from benchmarks.short_run import seconds_in_turns
from benchmarks.sink_conditions import (
    CONDITIONS,
    LEAST_RATE,
    RECIPE,
    Condition,
    write_pieces,
)
from benchmarks.sweep import Run, Settings, from_seeds, made_by, measured_by, paired, train
from peerjax.data.pipeline import load_corpus, validation_rows
from peerjax.evaluation import ALL, evaluate
from peerjax.evaluation.activations import LargeActivations
from peerjax.evaluation.loss import Loss
from peerjax.evaluation.removal import removed_collection
from peerjax.evaluation.sinks import Sinks
from peerjax.evaluation.usage import routers
from peerjax.inference.trained import open_run, restore
from peerjax.layers.peer import ALWAYS_ON
from peerjax.layers.shared import NAME as SHARED_PATH
from peerjax.model import Decoder
from peerjax.sharding import make_mesh

NONE, TIED = "none", "tied MLP of 128"
OF_PEER: dict[str, Settings] = {
    NONE: {},
    TIED: {"model.shared_mlp": 128},
    "tied MLP of 32": {"model.shared_mlp": 32},
    "untied MLP of 128": {"model.shared_mlp": 128, "model.shared_tied": False},
    "4 experts always on": {"peer.always_on": 4},
    "16 experts always on": {"peer.always_on": 16},
    "sink logits": {"model.attention_sink": "logit"},
    "output gates": {"model.attention_sink": "gate"},
}
KINDS = {"PEER": "peer", "Monet": "monet_hd", "dense": "dense"}
ARMS = {
    **{("PEER", name): settings for name, settings in OF_PEER.items()},
    **{("Monet", name): OF_PEER[name] for name in (NONE, TIED)},
    ("dense", NONE): {},
}
ROWS = 96
TIMED_STEPS, ROUNDS = 40, 3
QUICK: Settings = {"data.sequence_length": 64, "eval.rows": 4}


def run(quick: bool) -> Result:
    """Finds a condition with sinks, and compares all arms under it."""
    more = QUICK if quick else {}
    write_pieces()
    tried = []
    for condition in CONDITIONS:
        if quick:
            condition = condition._replace(steps=QUICK_STEPS)
        settings = {**condition.settings(), **more, "seed": SEEDS[0]}
        found = train(RECIPE, settings, inspect=measured_by("benchmarks.attention_sink"))
        tried.append((condition, found))
        if found.more["sink_rate"] >= LEAST_RATE or quick:
            return _compare(tried, condition, more, quick)
    return Result(
        columns=("condition of PEER without a remedy", "sink rate", "alpha_1", "largest / median"),
        rows=[_row_of_condition(*each) for each in tried],
        figures=[
            Figure.at_least(
                "largest sink rate; below the bound, the claim is not tested",
                max(found.more["sink_rate"] for _, found in tried),
                LEAST_RATE,
            )
        ],
        details={"conditions": _details_of(tried), "verdict": "not tested"},
    )


def _compare(
    tried: Sequence[tuple[Condition, Run]], condition: Condition, more: Settings, quick: bool
) -> Result:
    arms = {
        (model, name): {**condition.settings(KINDS[model]), **more, **settings}
        for (model, name), settings in ARMS.items()
    }
    seeds, turns = (SEEDS[:2], (8, 1)) if quick else (SEEDS, (TIMED_STEPS, ROUNDS))
    runs = from_seeds(RECIPE, arms, seeds, inspect=measured_by("benchmarks.attention_sink"))
    timed = seconds_in_turns(RECIPE, arms, *turns)
    return Result(
        columns=(
            "arm", "nats/token", "sink rate", "alpha_1", "largest / median", "ms a step",
            "without it", "without routed experts",
        ),
        rows=[[", ".join(arm), *_cells(each, timed[arm])] for arm, each in runs.items()],
        figures=_figures(runs),
        details={
            "conditions": _details_of(tried),
            "arms": [
                {
                    "arm": arm, "losses": [run.nats_per_token for run in each],
                    "measured": [run.more for run in each],
                    "seconds_per_step": timed[arm], "made_by": made_by(each),
                }
                for arm, each in runs.items()
            ],
        },
    )  # fmt: skip


def _row_of_condition(condition: Condition, found: Run) -> list[str]:
    documents = "short documents" if condition.short_documents else "whole documents"
    name = f"{documents}, {condition.depth} layers, {condition.steps:,} steps"
    return [name, *(f"{found.more[each]:.4g}" for each in ("sink_rate", "alpha_1", "ratio"))]


def _details_of(tried: Sequence[tuple[Condition, Run]]) -> list[dict[str, Any]]:
    return [
        {**condition._asdict(), "loss": found.nats_per_token, "measured": found.more}
        for condition, found in tried
    ]


def _cells(runs: Sequence[Run], seconds: Sequence[float]) -> list[str]:
    def mean(name: str) -> str:
        values = [run.more[name] for run in runs if name in run.more]
        return f"{np.mean(values):.4f}" if values else ""

    return [
        f"{np.mean([run.nats_per_token for run in runs]):.4f}",
        *map(mean, ("sink_rate", "alpha_1", "ratio")),
        f"{1e3 * np.median(seconds):.0f}",
        *map(mean, ("without_path", "without_experts")),
    ]


def _figures(runs: Mapping[tuple[str, str], Sequence[Run]]) -> list[Figure]:
    def difference(name: str, first: tuple[str, str], second: tuple[str, str]) -> list[Figure]:
        values = [
            [run.nats_per_token if name == "nats/token" else run.more[name] for run in runs[arm]]
            for arm in (first, second)
        ]
        label = f"{', '.join(first)} - {', '.join(second)}: {name}"
        return paired(*values).figures(label)

    figures = []
    for name in ("nats/token", "sink_rate", "alpha_1"):
        for model in ("PEER", "Monet"):
            figures += difference(name, (model, NONE), ("dense", NONE))
            figures += difference(name, (model, TIED), (model, NONE))
        for other in list(OF_PEER)[2:]:
            figures += difference(name, ("PEER", other), ("PEER", NONE))
    return figures


def measured(workdir: str) -> dict[str, Any]:
    """Returns means over layers and heads of a run's sink figures, and losses without its parts.

    Contexts begin with the end-of-text token. The losses are without the shared path or the
    experts that are always on, and without all experts that routers choose.
    """
    trained, mesh = open_run(workdir), make_mesh()
    texts = load_corpus(trained.config).validation
    loss = Loss.of(trained.tokenizer)
    probes = {
        "sinks": Sinks(first_token=trained.tokenizer.end_of_text),
        "activations": LargeActivations(),
        "loss": loss,
    }
    every = {
        name: np.ones(router.num_experts, bool)
        for router in routers(trained.model)
        for name in router.names
    }
    if every:
        given = removed_collection(trained.model, every)
        probes["without experts"] = dataclasses.replace(loss, given=given)
    with jax.set_mesh(mesh):
        variables = restore(trained, mesh)
        measure = partial(
            evaluate, trained.model, texts=texts, mesh=mesh,
            rows=partial(validation_rows, count=ROWS),
            batch_size=trained.config.data.batch_size,
        )  # fmt: skip
        found = measure(variables, probes=probes)[ALL]
        without = without_path(trained.model, variables)
        more = {}
        if without is not None:
            rest = measure(without, probes={"loss": loss})[ALL]["loss"]
            more["without_path"] = rest["nats_per_token"]
    layers = [f"layer_{layer}" for layer in range(trained.model.config.depth)]
    if "without experts" in found:
        more["without_experts"] = found["without experts"]["nats_per_token"]
    return {
        "sink_rate": float(np.mean([found["sinks"][each]["sink_rate"] for each in layers])),
        "alpha_1": float(np.mean([found["sinks"][each]["alpha_1"] for each in layers])),
        "first_share": float(np.mean([found["sinks"][each]["first_share"] for each in layers])),
        "ratio": max(found["activations"][each]["ratio"] for each in layers),
        "with_all": found["loss"]["nats_per_token"],
        "by_head": {
            row: figures["alpha_1"] for row, figures in found["sinks"].items() if "head" in row
        },
        **more,
    }


def without_path(model: Decoder, variables: Any) -> Any:
    """Returns variables without the shared path and experts that are always on, if there are any.

    The second matrices of shared paths become 0. Always-on pools do, too.
    """
    spec: Any = model.config.layers[0][0]
    has_pool = ALWAYS_ON in spec.pools
    if not (model.config.shared_mlp and spec.is_sparse) and not has_pool:
        return None

    def zero_path(path: Any, leaf: Any) -> Any:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return jnp.zeros_like(leaf) if names[-2:] == [SHARED_PATH, "up"] else leaf

    params = jax.tree_util.tree_map_with_path(zero_path, variables["params"])
    pools = {
        stack: {
            # Zeros are experts without an output in every storage.
            name: jax.tree.map(jnp.zeros_like, pool) if name == ALWAYS_ON else pool
            for name, pool in of_stack.items()
        }
        for stack, of_stack in variables["pools"].items()
    }
    return {**variables, "params": params, "pools": pools}


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1])))
