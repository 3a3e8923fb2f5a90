"""Trains `configs/reference.py` and its dense twin, which are tuned and then run from three seeds.

Learning rates are tuned at a third of the length. The recipes contain the best ones.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np

from benchmarks.protocol import OF_POOLS, QUICK_STEPS, SEEDS, SHARED
from benchmarks.recipes import config_of
from benchmarks.result import REPOSITORY, Figure, Result
from benchmarks.sweep import (
    ROOT,
    Run,
    Settings,
    at_once,
    from_seeds,
    made_by,
    measured_by,
    paired,
    tune_rates,
)
from peerjax.analysis.effective import effective_experts
from peerjax.data.pipeline import load_corpus, validation_rows
from peerjax.inference.trained import open_run, restore
from peerjax.optim import dequantize
from peerjax.sharding import make_mesh

PEER, DENSE = "reference", "reference_dense"
STARTS = {PEER: {SHARED: 1e-2, OF_POOLS: 3e-2}, DENSE: {SHARED: 1e-2}}
MILLIONS_OF_TOKENS = (1, 3, 10)
QUICK: Settings = {"data.sequence_length": 64, "eval.rows": 4, "eval.every": 4}
ROWS = 16  # of each domain, for the effective number of experts


def run(quick: bool) -> Result:
    """Trains what no earlier call trained, and compares both models."""
    steps = QUICK_STEPS if quick else config_of(PEER).steps
    seeds, more = (SEEDS[:2], QUICK) if quick else (SEEDS, {})
    tuned = dict(
        zip(
            STARTS,
            at_once([partial(tune_rates, each, more, STARTS[each], steps) for each in STARTS]),
            strict=True,
        )
    )

    def from_every_seed(recipe: str) -> list[Run]:
        return from_seeds(
            recipe,
            {recipe: {**more, "steps": steps, **tuned[recipe][0]}},
            seeds,
            keep_series=True,
            keep_checkpoints=True,  # other benchmarks start from them
            inspect=measured_by("benchmarks.reference") if recipe == PEER else lambda folder: {},
        )[recipe]

    trained = at_once([partial(from_every_seed, recipe) for recipe in STARTS])
    runs = dict(zip(STARTS, trained, strict=True))
    losses = {recipe: [run.nats_per_token for run in each] for recipe, each in runs.items()}
    difference = paired(losses[PEER], losses[DENSE])
    plot(runs, ROOT / "reference" if quick else REPOSITORY / "docs" / "reference")
    return Result(
        columns=("recipe", "rates", *_names_of_tokens(), "speeches", "drama", "code", "minutes"),
        rows=[_row(recipe, tuned[recipe][0], each) for recipe, each in runs.items()],
        figures=[
            *difference.figures("reference - reference_dense (nats/token)"),
            *_figures_of_experts(runs[PEER]),
        ],
        details={
            recipe: {
                "rates": tuned[recipe][0],
                "tuning": tuned[recipe][1],
                "losses": losses[recipe],
                "experts": [run.experts for run in each],
                "effective": [run.more for run in each],
                "series": [run.series for run in each],
                "seconds": [run.seconds for run in each],
                "made_by": made_by(each),
            }
            for recipe, each in runs.items()
        },
    )


def _names_of_tokens() -> list[str]:
    return [f"{millions} M tokens" for millions in MILLIONS_OF_TOKENS]


def _row(recipe: str, rates: Mapping[str, float], runs: Sequence[Run]) -> list[str]:
    config = config_of(recipe)
    tokens = config.data.batch_size * config.data.sequence_length

    def mean_loss(millions: float) -> float:
        """Returns the mean loss of the evaluation that is nearest to a number of tokens."""
        key = "validation/all/nats_per_token"
        return np.mean(
            [
                min(run.series, key=lambda each: abs(each["step"] * tokens - millions * 1e6))[key]
                for run in runs
            ]
        )

    def of_domain(domain: str) -> float:
        return np.mean([run.series[-1][f"validation/{domain}/nats_per_token"] for run in runs])

    return [
        recipe,
        " ".join(f"{rate:g}" for rate in rates.values()),
        *(f"{mean_loss(millions):.4f}" for millions in MILLIONS_OF_TOKENS),
        *(f"{of_domain(domain):.4f}" for domain in config.data.domains),
        f"{np.median([run.seconds for run in runs]) / 60:.0f}",
    ]


def _figures_of_experts(runs: Sequence[Run]) -> list[Figure]:
    figures = []
    for layer in runs[0].experts:
        usage = np.mean([run.experts[layer]["usage"] for run in runs])
        effective = np.mean([run.more[layer] for run in runs])
        figures.append(Figure(f"{layer}: experts used", float(usage)))
        figures.append(Figure(f"{layer}: effective experts a token", float(effective)))
    return figures


def effective_of(workdir: str) -> dict[str, float]:
    """Returns the effective number of experts a token in a run, averaged over its domains."""
    trained = open_run(workdir)
    variables = jax.jit(dequantize)(restore(trained, make_mesh()))
    measure = jax.jit(effective_experts, static_argnums=0)
    every: list[Any] = []
    for text in load_corpus(trained.config).validation.values():
        rows = [dict(text[number]) for number in validation_rows(text, ROWS)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        every.append(jax.device_get(measure(trained.model, variables, batch)))
    return {layer: float(np.mean([each[layer] for each in every])) for layer in every[0]}


def plot(runs: Mapping[str, Sequence[Run]], folder: Path) -> None:
    """Draws validation loss and usage against training tokens, for every seed."""
    figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (recipe, each) in enumerate(runs.items()):
        config = config_of(recipe)
        tokens = config.data.batch_size * config.data.sequence_length / 1e6
        for run in each:
            after = [point for point in run.series if point["step"]]
            millions = [point["step"] * tokens for point in after]
            loss = [point["validation/all/nats_per_token"] for point in after]
            left.plot(millions, loss, f"C{index}", label=recipe if run is each[0] else None)
            for number, layer in enumerate(run.experts):
                usage = [point[f"experts/{layer}/usage"] for point in after]
                label = layer if run is each[0] else None
                right.plot(millions, usage, f"C{number + 2}", label=label)
    left.set(xscale="log", xlabel="million tokens", ylabel="validation loss, nats/token")
    right.set(xlabel="million tokens", ylabel="share of experts in use", ylim=(0, 1))
    left.legend()
    right.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "training.png", dpi=100)


if __name__ == "__main__":
    print(json.dumps(effective_of(sys.argv[1])))
