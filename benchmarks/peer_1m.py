"""A decoder with a layer of a million experts, in int4 and in float32 with AdamW, from train.py.

Peak memory of the whole process and seconds a step, checkpoints and evaluation not counted in the
latter.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.result import REPOSITORY, Figure, Result

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


def train(recipe: str, steps: int) -> dict[str, Any]:
    """Trains in a process of its own."""
    with tempfile.TemporaryDirectory() as workdir:
        process = subprocess.Popen(
            [
                sys.executable,
                "train.py",
                f"--config=configs/{recipe}.py",
                f"--workdir={workdir}",
                f"--config.steps={steps}",
                f"--config.checkpoint.every={steps}",
            ],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"train.py with {recipe} ended with status {process.returncode}")
        report = json.loads((Path(workdir) / "report.json").read_text())
    seconds = report["tokens_per_step"] / report["tokens_per_second"]
    return {"peak_bytes": usage.ru_maxrss * 1024, "seconds_per_step": seconds}
