"""A step's figures, fetched while the next step computes, and what they give cause to say."""

import math
from collections.abc import Iterator, Mapping

import jax
import ml_collections
import numpy as np
from jaxtyping import Integer

from peerjax.errors import DivergenceError

# Share of the codes of rows hit that stop at their limit in one step: normal weights have 0.3%.
TOO_MANY_CLIPPED = 0.05


class Pending:
    """The figures of a step that has been started but perhaps not finished.

    Args:
        step: its number, from 1.
        metrics: what the step returned.
        rows: which rows of the training text it read.
    """

    def __init__(
        self, step: int, metrics: Mapping[str, jax.Array], rows: Integer[np.ndarray, " B"]
    ):
        self.step = step
        self._metrics = metrics
        self._rows = rows

    def figures(self) -> dict[str, float]:
        """Waits for the step."""
        return {name: float(value) for name, value in jax.device_get(self._metrics).items()}

    def place(self) -> str:
        """Names the step and the text that it read."""
        rows = ", ".join(str(int(row)) for row in self._rows[:8])
        more = "..." if len(self._rows) > 8 else ""
        return f"step {self.step} (batch {self.step - 1}, rows {rows}{more} of the training text)"


class Warnings:
    """Watches the figures of a run for what its user should know."""

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config
        self._warned = False

    def about(self, pending: Pending, figures: Mapping[str, float]) -> Iterator[str]:
        """Yields a line for each thing to say about a step.

        Raises:
            DivergenceError: if as many steps in a row were skipped as the configuration allows.
        """
        in_a_row = round(figures["skipped/in_a_row"])
        if in_a_row:
            names = [name for name, value in figures.items() if not math.isfinite(value)]
            what = " and ".join(names) or "the gradient of a pool"
            verb = "are" if len(names) > 1 else "is"
            skipped = f"{what} {verb} not finite in {pending.place()}"
            if in_a_row >= self._config.max_skipped_steps:
                raise DivergenceError(
                    f"{skipped}; {in_a_row} steps in a row were skipped for that "
                    "(max_skipped_steps); the last checkpoint before them is kept; lower the "
                    "learning rates, or look at those rows"
                )
            yield f"warning: {skipped}; the step is skipped, {in_a_row} in a row so far"
        for name, share in figures.items():
            if name.startswith("pool_clipped/") and share > TOO_MANY_CLIPPED and not self._warned:
                self._warned = True
                yield (
                    f"warning: {share:.1%} of the codes that step {pending.step} moved in "
                    f"{name.split('/')[1]} went beyond the end of their range; "
                    f"pool.learning_rate={self._config.pool.learning_rate} may be too large"
                )
