"""Measures how many experts PEER uses, and how evenly, with and without normalised queries.

This is the PEER paper's table of usage and unevenness (arXiv:2407.04153, section 3.3), on the
quickstart. It compares batch normalisation by running statistics, layer normalisation, and no
normalisation. Learning rates of each are tuned at a third of the length.
"""

import numpy as np

from benchmarks.equal_flops import arm_of, tune_and_train
from benchmarks.protocol import (
    EVALUATION,
    OF_POOLS,
    QUICK_STEPS,
    SEEDS,
    SHARED,
    START,
    STEPS,
)
from benchmarks.result import Figure, Result
from benchmarks.sweep import paired

BATCH, LAYER, NONE = "batchnorm", "layernorm", "none"


def run(quick: bool) -> Result:
    """Trains all arms that no earlier call trained, and compares them."""
    steps, seeds = (QUICK_STEPS, SEEDS[:2]) if quick else (STEPS, SEEDS)
    norms = (BATCH, NONE) if quick else (BATCH, LAYER, NONE)
    arms = {
        norm: arm_of({**EVALUATION, "pool.storage": "int4", "peer.query_norm": norm})
        for norm in norms
    }
    trained = tune_and_train(arms, dict.fromkeys(arms, START), steps, seeds)
    rows, figures = [], []
    for norm, each in trained.items():
        difference = paired(each.losses, trained[BATCH].losses)
        usage, unevenness = (each.over_layers(what) for what in ("usage", "unevenness"))
        rows.append(
            [
                norm,
                f"{each.rates[SHARED]:g}",
                f"{each.rates[OF_POOLS]:g}",
                f"{np.mean(each.losses):.4f}",
                str(difference),
                f"{usage:.1%}",
                f"{unevenness:.3f}",
            ]
        )
        figures.append(Figure(f"{norm}: experts used", usage))
    details = {
        norm: {
            "rates": each.rates,
            "tuning": each.tuning,
            "losses": each.losses,
            "experts": [run.experts for run in each.runs],
        }
        for norm, each in trained.items()
    }
    columns = ("norm", "rate", "of pools", "nats/token", "beyond batchnorm", "used", "unevenness")
    return Result(columns, rows, figures, {"steps": steps, "norms": details})
