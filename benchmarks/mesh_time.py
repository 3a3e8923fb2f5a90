"""Compares the quickstart's step on one device with that on two devices of the same CPU.

The two devices are in one process or in two, and share its cores. Runs take turns.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.result import REPOSITORY, Figure, Result

STEPS, ROUNDS = 40, 3
# Processes, devices of each, and the largest time of a step over that of one device.
SETTINGS = {
    "one device": (1, 1, None),
    "one process, two devices": (1, 2, 1.3),
    "two processes": (2, 1, 2.0),
}


def run(quick: bool) -> Result:
    """Trains for a few steps in every setting; `quick` for fewer, once."""
    steps, rounds = (8, 1) if quick else (STEPS, ROUNDS)
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, (processes, devices, _) in SETTINGS.items():
            seconds[name].append(_seconds_per_step(steps, processes, devices))
    one = seconds["one device"]
    figures = [
        Figure.at_most(
            f"{name}: time of a step, over one device",
            statistics.median(own / base for own, base in zip(seconds[name], one, strict=True)),
            bound,
        )
        for name, (_, _, bound) in SETTINGS.items()
        if bound is not None
    ]
    rows = [[name, f"{1e3 * statistics.median(each):.0f}"] for name, each in seconds.items()]
    return Result(("devices", "ms a step"), rows, figures, {"seconds": seconds})


def _seconds_per_step(steps: int, processes: int, devices: int) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [
        "--config=configs/quickstart.py",
        *(f"--config.{name}={steps}" for name in ("steps", "checkpoint.every", "eval.every")),
    ]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    with tempfile.TemporaryDirectory() as workdir:
        running = []
        for process in range(processes):
            place = [
                f"--coordinator=127.0.0.1:{port}",
                f"--processes={processes}",
                f"--process={process}",
            ]
            command = [sys.executable, "train.py", *flags, f"--workdir={workdir}"]
            running.append(
                subprocess.Popen(
                    [*command, *(place if processes > 1 else [])],
                    cwd=REPOSITORY,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                )
            )
        if any([each.wait() for each in running]):
            raise RuntimeError(f"train.py failed in {processes} processes of {devices} devices")
        report = json.loads((Path(workdir) / "report.json").read_text())
    return report["tokens_per_step"] / report["tokens_per_second"]
