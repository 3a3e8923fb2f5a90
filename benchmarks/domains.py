"""Measures losses of PEER and Monet on every domain without the experts of one domain.

The quickstart is trained with each model, at the learning rates that `monet` finds. It is evaluated
as by `evaluate.py --remove_domains=all`.
"""

import dataclasses
from functools import partial
from typing import Any

from benchmarks import short_run
from benchmarks.monet_models import HD, PEER_INT4, VD, arm_named, start_of
from benchmarks.protocol import QUICK_STEPS, RECIPE, STEPS
from benchmarks.result import Figure, Result
from benchmarks.sweep import tune_rates
from peerjax.evaluation import ALL
from peerjax.inference.evaluating import evaluate_without
from peerjax.inference.trained import open_run


def run(quick: bool) -> Result:
    """Trains every model, and removes the experts of each domain in turn."""
    steps = QUICK_STEPS if quick else STEPS
    rows, figures, details = [], [], {}
    for name in (PEER_INT4,) if quick else (PEER_INT4, HD, VD):
        settings = arm_named(name).settings
        rates, _ = tune_rates(RECIPE, settings, start_of(name), steps)
        found = short_run.train(
            RECIPE, steps, {**settings, **rates}, partial(evaluate, rows=4 if quick else None)
        )
        removals = details[name] = found["found"]
        for removal in removals:
            rows += _rows(name, removal)
            domain, changes, control = (removal[key] for key in ("domain", "changes", "control"))
            others = [change for other, change in changes.items() if other != domain]
            figures += [
                Figure(f"{name}, {domain}: loss gained there without its experts", changes[domain]),
                Figure("mean over other domains", sum(others) / len(others)),
                Figure("there, without as many at random", control[domain]),
            ]
    texts = details[PEER_INT4][0]["changes"]
    columns = ("model", "removed", "experts", *(f"on {text}" for text in texts))
    return Result(columns, rows, figures, details)


def evaluate(workdir: str, rows: int | None = None) -> list[dict[str, Any]]:
    """Returns the removals of a run, as values for JSON."""
    removals = evaluate_without(open_run(workdir), [ALL], rows=rows).removals
    return [dataclasses.asdict(removal) for removal in removals]


def _rows(model: str, removal: dict[str, Any]) -> list[list[str]]:
    count = f"{sum(removal['experts'].values()):,}"
    return [
        [model, which, count, *(f"{change:+.4f}" for change in removal[key].values())]
        for which, key in ((removal["domain"], "changes"), ("as many at random", "control"))
    ]
