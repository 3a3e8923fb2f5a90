"""Shows how evenly `peer.spread` splits the load of experts over devices.

The load of a device is the number of (expert, token) pairs of its experts. Ids are those of
`configs/reference.py` after training (`python -m benchmarks reference` keeps its checkpoints), or
of sub-keys that are drawn by Zipf's law.
"""

from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.protocol import SEEDS
from benchmarks.recipes import config_of
from benchmarks.result import Figure, Result
from benchmarks.sweep import ROOT
from peerjax.data.pipeline import load_corpus, validation_rows
from peerjax.inference.trained import open_run, restore
from peerjax.objectives.task import inputs_of
from peerjax.optim import dequantize
from peerjax.routing.auxiliary import CHOICE, ROUTING, by_module
from peerjax.routing.product_keys import spread_ids
from peerjax.sharding import make_mesh

SHARDS, SPREADS = (8, 64), (1, 256, 1024)
EXPONENT, KEYS, PAIRS = 0.8, 1024, 1 << 20
ROWS = 16  # of validation text


def run(quick: bool) -> Result:
    """Counts loads; `quick` only those of drawn sub-keys."""
    rows, details = [], {}
    for name, ids, num_keys in _cases(quick):
        for spread in SPREADS:
            if num_keys[1] % spread:
                continue
            loads = [_worst(ids, num_keys, spread, shards) for shards in SHARDS]
            details[f"{name}, V = {spread}"] = dict(zip(map(str, SHARDS), loads, strict=True))
            rows.append([name, f"{spread:,}", *(f"{load:.2f}" for load in loads)])
    columns = ("ids", "V", *(f"worst of {shards} / mean" for shards in SHARDS))
    drawn = [details[f"sub-keys by Zipf {EXPONENT}, V = 1024"][str(shards)] for shards in SHARDS]
    figures = [
        Figure.at_most(f"Zipf, V = 1,024: worst of {shards} over the mean", load, bound)
        for shards, load, bound in zip(SHARDS, drawn, (1.1, 1.3), strict=True)
    ]
    return Result(columns=columns, rows=rows, figures=figures, details=details)


def _cases(quick: bool) -> Iterator[tuple[str, np.ndarray, tuple[int, int]]]:
    rng = np.random.default_rng(0)
    law = 1 / np.arange(1, KEYS + 1) ** EXPONENT
    # Hot sub-keys are anywhere, and independent on both sides.
    orders = [rng.permutation(KEYS) for _ in range(2)]
    i, j = (order[rng.choice(KEYS, PAIRS, p=law / law.sum())] for order in orders)
    yield f"sub-keys by Zipf {EXPONENT}", i * KEYS + j, (KEYS, KEYS)
    if not quick:
        yield from _trained()


def _trained() -> Iterator[tuple[str, np.ndarray, tuple[int, int]]]:
    """Yields the ids of validation text, layer by layer, of the first finished reference run."""
    config = config_of("reference")
    folders = [
        path.parent
        for path in sorted((ROOT / "reference").glob("*/report.json"))
        if f"seed={SEEDS[0]}" in path.parent.name and f"steps={config.steps}" in path.parent.name
    ]
    if not folders:
        raise FileNotFoundError("run `python -m benchmarks reference` first; it keeps checkpoints")
    run = open_run(str(folders[0]))
    variables = jax.jit(dequantize)(restore(run, make_mesh()))
    text = next(iter(load_corpus(run.config).validation.values()))
    rows = [dict(text[number]) for number in validation_rows(text, ROWS)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    sown = jax.jit(
        lambda variables, batch: run.model.apply(variables, *inputs_of(batch), mutable=[ROUTING])[1]
    )(variables, batch)
    for path, values in by_module(sown[ROUTING]).items():
        for number, ids in enumerate(np.asarray(values[CHOICE].ids)):
            name = f"reference, layer {run.model.config.place(path).layers[number]}"
            yield name, ids.reshape(-1), tuple(run.config.peer.num_experts)


def _worst(ids: np.ndarray, num_keys: tuple[int, int], spread: int, shards: int) -> float:
    """Returns the load of the worst of equal ranges of numbers, over the mean load."""
    total = num_keys[0] * num_keys[1]
    moved = np.asarray(spread_ids(ids, num_keys, spread))
    loads = np.bincount(moved[moved < total] * shards // total, minlength=shards)
    return float(loads.max() / loads.mean())
