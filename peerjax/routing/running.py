"""State of routers that follows the text: it is read without a gradient, and steps update it.

A router reads the collection "stats". In training, it sows what a batch shows into "moments", and
each step updates "stats" from that. Values that the first batch sets are sown into "first".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

# Collections: state that a layer reads, figures of the current batch, and values for a fresh run.
STATS, MOMENTS, FIRST = "stats", "moments", "first"
# Largest change of a threshold in one step, in deviations of the scores of the first batch.
THRESHOLD_RATE = 0.2
# Weight of a step in running shares of metaexperts. A few documents fill a step, so shares of one
# step vary.
SHARE_RATE = 0.1


class Moments(NamedTuple):
    """Mean and variance of a batch, or running ones over steps."""

    mean: Array
    variance: Array

    def pooled(self) -> Moments:
        """Returns the moments of a whole from those of its equal parts, on a leading axis."""
        return Moments(self.mean.mean(0), self.variance.mean(0) + self.mean.var(0))

    def after(self, seen: Moments, momentum: float) -> Moments:
        """Returns the running moments after a step; momentum 1 replaces the old ones."""
        return jax.tree.map(lambda old, new: old + momentum * (new - old), self, seen)


class Active(NamedTuple):
    """Counts of a batch for thresholds. Sums of integers are the same on every mesh and split.

    Attributes:
        experts: number of active experts of each head over the batch.
        tokens: number of tokens.
    """

    experts: Int[Array, "*layers H"]
    tokens: Int[Array, "*layers"]

    def pooled(self) -> Active:
        """Returns the counts of a whole from those of its parts, on a leading axis."""
        return Active(self.experts.sum(0), self.tokens.sum(0))


class Threshold(NamedTuple):
    """A threshold of each head that follows the number of active experts.

    Attributes:
        value: the threshold.
        deviation: standard deviation of the scores of the first batch.
        wanted: mean number of active experts a token that each head is to have.
    """

    value: Float[Array, "*layers H"]
    deviation: Float[Array, "*layers"]
    wanted: Float[Array, "*layers"]

    def after(self, seen: Active, momentum: float) -> Threshold:
        """Returns the threshold after a step. It rises if too many experts were active."""
        excess = seen.experts / (seen.tokens * self.wanted)[..., None] - 1
        largest = THRESHOLD_RATE * self.deviation[..., None]
        return self._replace(value=self.value + largest * jnp.clip(excess, -1, 1))


class ScoreScale(NamedTuple):
    """Figures of the scores of the first batch.

    Attributes:
        mean_active: mean score above the thresholds.
        deviation: standard deviation of all retrieved scores.
    """

    mean_active: Float[Array, ""]
    deviation: Float[Array, ""]


class Shares(NamedTuple):
    """Figures of metaexperts: of a batch, or running ones over steps.

    Attributes:
        probability: mean probability of each metaexpert.
        chosen: share of each metaexpert in the choices.
    """

    probability: Float[Array, "*layers M"]
    chosen: Float[Array, "*layers M"]

    @staticmethod
    def even(metaexperts: int) -> Shares:
        """Returns equal shares."""
        return Shares(*(jnp.full(metaexperts, 1 / metaexperts) for _ in range(2)))

    def pooled(self) -> Shares:
        """Returns the shares of a whole from those of its equal parts, on a leading axis."""
        return Shares(self.probability.mean(0), self.chosen.mean(0))

    def after(self, seen: Shares, momentum: float) -> Shares:
        """Returns the running shares after a step. They change slowly, whatever `momentum` is."""
        return jax.tree.map(lambda old, new: old + SHARE_RATE * (new - old), self, seen)


def pooled(parts: Any) -> Any:
    """Returns the collection "moments" of a whole from those of its equal parts, stacked."""
    return jax.tree.map(lambda each: each.pooled(), parts, is_leaf=_is_of_batch)


def updated(stats: Any, moments: Any, momentum: float) -> Any:
    """Returns the collection "stats" after a step.

    Args:
        stats: the collection, which may have more than what steps update.
        moments: the collection "moments" of the step. Its paths are among those of `stats`.
        momentum: weight of the step in running moments.
    """
    if not isinstance(stats, dict):
        return stats.after(moments, momentum)
    return {
        name: updated(of_name, moments[name], momentum) if name in moments else of_name
        for name, of_name in stats.items()
    }


def with_first(collection: Any, first: Any) -> Any:
    """Returns a collection in which values of "first" replace those of the same path."""
    values = flatten_dict(first)
    return unflatten_dict(
        {path: values.get(path, old) for path, old in flatten_dict(collection).items()}
    )


def needs_first_batch(stats: Any) -> bool:
    """Returns whether the first batch of a fresh run sets some of the collection "stats"."""

    def is_set(node: Any) -> bool:
        return isinstance(node, Moments | Threshold | ScoreScale | Shares)

    return any(map(is_set, jax.tree.leaves(stats, is_leaf=is_set)))


def _is_of_batch(node: Any) -> bool:
    return isinstance(node, Moments | Active | Shares)
