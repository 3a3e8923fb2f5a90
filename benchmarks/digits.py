"""Compares the examples' classifiers: packed int4 matrices, and float32 with AdamW."""

import numpy as np

from benchmarks.result import Figure, Result
from examples import digits, digits_nnx

SEEDS = 3


def run(quick: bool) -> Result:
    """Trains all classifiers from the same seeds."""
    seeds = 1 if quick else SEEDS
    found = digits.compare(seeds)
    of_nnx = [digits_nnx.train(seed) for seed in range(seeds)]
    found["int4, Flax NNX"] = (
        float(np.mean([accuracy for accuracy, _ in of_nnx])),
        of_nnx[0][1],
    )
    floats, float_bytes = found["float32, AdamW"]
    figures = []
    for name, (accuracy, size) in found.items():
        if name != "float32, AdamW":
            figures += [
                Figure.at_least(f"accuracy of {name}, beyond float32", accuracy - floats, -0.005),
                Figure.at_most(f"bytes of {name}, share of float32's", size / float_bytes, 0.125),
            ]
    return Result(
        columns=("weights", "test accuracy", "bytes of weights and optimizer state"),
        rows=[[name, f"{accuracy:.2%}", f"{size:,}"] for name, (accuracy, size) in found.items()],
        figures=figures,
        details={
            name: {"accuracy": accuracy, "bytes": size} for name, (accuracy, size) in found.items()
        },
    )
