"""Trains a decoder with a layer of a million experts, in int4 and in float32 with AdamW.

Measures the peak memory of the whole process of train.py, and the seconds a step. Checkpoints and
evaluation are not counted in the seconds.
"""

from benchmarks.result import Figure, Result
from benchmarks.short_run import train

ARMS = {"peer_1m_cpu": 12, "peer_1m": 5}  # steps


def run(quick: bool) -> Result:
    """Trains both recipes for a few steps."""
    arms = dict.fromkeys(list(ARMS)[:1], 4) if quick else ARMS
    found = {recipe: train(recipe, steps) for recipe, steps in arms.items()}
    rows = [
        [recipe, f"{each['peak_bytes'] / 1e9:.1f}", f"{each['seconds_per_step']:.2f}"]
        for recipe, each in found.items()
    ]
    figures = [
        Figure("peak GB of peer_1m_cpu", found["peer_1m_cpu"]["peak_bytes"] / 1e9),
        Figure("seconds a step of peer_1m_cpu", found["peer_1m_cpu"]["seconds_per_step"]),
    ]
    return Result(("recipe", "peak GB", "seconds a step"), rows, figures, found)
