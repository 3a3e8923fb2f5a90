"""Compares the time of a step of the quickstart with that of an earlier commit, in turns.

The earlier commit is checked out into a folder of its own. Both use the installed packages.
"""

import statistics
import subprocess
import tempfile
from pathlib import Path

from benchmarks.result import REPOSITORY, Figure, Result
from benchmarks.short_run import train
from pallas_kernels.dispatch import identity

BEFORE = "7bc42a5"  # before native kernels and the gains in plain JAX
STEPS, ROUNDS = 60, 5


def run(quick: bool) -> Result:
    """Trains the quickstart for a few steps, with both commits."""
    steps, rounds = (12, 1) if quick else (STEPS, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        _git("worktree", "add", "--detach", str(before), BEFORE)
        try:
            repositories = {BEFORE: before, "now": REPOSITORY}
            seconds: dict[str, list[float]] = {name: [] for name in repositories}
            for _ in range(rounds):
                for name, repository in repositories.items():
                    found = train("quickstart", steps, repository=repository)
                    seconds[name].append(found["seconds_per_step"])
        finally:
            _git("worktree", "remove", "--force", str(before))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratio = statistics.median(
        now / then for now, then in zip(seconds["now"], seconds[BEFORE], strict=True)
    )
    return Result(
        columns=("commit", "ms a step"),
        rows=[[name, f"{1e3 * median:.0f}"] for name, median in medians.items()],
        figures=[Figure.at_most(f"time of a step, over {BEFORE}", ratio, 0.6)],
        details={"kernels": identity(), "seconds": seconds},
    )


def _git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True)
