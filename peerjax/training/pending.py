"""Metrics of a step, fetched while the next step computes, and warnings about them."""

import math
from collections.abc import Iterator, Mapping

import jax
import ml_collections
import numpy as np
from jaxtyping import Integer

from peerjax.errors import DivergenceError

# A warning is printed if more than this share of the codes of hit vectors exceed their range in one
# step. Normal weights have 0.3%.
TOO_MANY_CLIPPED = 0.05


class Pending:
    """The metrics of a step that has started, but may not have finished.

    Args:
        step: number of the step, from 1.
        metrics: metrics that the step returned.
        rows: numbers of the rows of training text that the step read.
    """

    def __init__(
        self, step: int, metrics: Mapping[str, jax.Array], rows: Integer[np.ndarray, " B"]
    ):
        self.step = step
        self._metrics = metrics
        self._rows = rows

    def figures(self) -> dict[str, float]:
        """Waits for the step and returns its metrics."""
        return {name: float(value) for name, value in jax.device_get(self._metrics).items()}

    def place(self) -> str:
        """Returns a description of the step and of the text that it read."""
        rows = ", ".join(str(int(row)) for row in self._rows[:8])
        more = "..." if len(self._rows) > 8 else ""
        return f"step {self.step} (batch {self.step - 1}, rows {rows}{more} of the training text)"


class Warnings:
    """Finds problems in the metrics of a run."""

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config
        self._warned = False

    def about(self, pending: Pending, figures: Mapping[str, float]) -> Iterator[str]:
        """Yields a warning for each problem in a step.

        Raises:
            DivergenceError: if `max_skipped_steps` steps in a row were skipped.
        """
        in_a_row = round(figures["skipped/in_a_row"])
        if in_a_row:
            names = [name for name, value in figures.items() if not math.isfinite(value)]
            what = " and ".join(names) or "the gradient of a pool"
            verb = "are" if len(names) > 1 else "is"
            skipped = f"{what} {verb} not finite in {pending.place()}"
            if in_a_row >= self._config.max_skipped_steps:
                raise DivergenceError(
                    f"{skipped}; {in_a_row} steps in a row were skipped, which is the limit "
                    "max_skipped_steps; the last checkpoint before them is kept; lower the "
                    "learning rates, or inspect those rows"
                )
            yield f"warning: {skipped}; the step is skipped, {in_a_row} in a row so far"
        for name, share in figures.items():
            if name.startswith("pool_clipped/") and share > TOO_MANY_CLIPPED and not self._warned:
                self._warned = True
                yield (
                    f"warning: {share:.1%} of the codes that step {pending.step} updated in "
                    f"{name.split('/')[1]} exceeded their range; "
                    f"pool.learning_rate={self._config.pool.learning_rate} may be too large"
                )
