"""Batch normalisation for routers that does not look into the future.

Statistics of the batch at hand would tell a token about the tokens after it: changing the last
token of a text changes which experts its first tokens choose. A router here normalises by running
statistics of the steps before, through which no gradient flows; the step moves them afterwards.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peerjax.routing.auxiliary import sow_last

# Collections: what a layer reads, and what it found in the batch at hand.
STATS, MOMENTS = "stats", "moments"
# Whose statistics a training step normalises by: those of the steps before, or of its own batch.
RUNNING, IN_BATCH = "running", "in_batch"


class Moments(NamedTuple):
    """Mean and variance, of a batch or running over steps."""

    mean: Array
    variance: Array


class RunningNorm(nn.Module):
    """`(z - mean) / sqrt(variance + eps)`.

    Reads `moments` of the collection "stats"; where the collection "moments" is mutable, as in
    training, sows those of z there.

    Attributes:
        axes: over which z has one mean and one variance; the tokens are among them.
        statistics: "running"; or "in_batch", which leaks the future and is there to compare with
            the papers: in training, z is normalised by its own moments, gradient and all.
        eps: added to the variance.
    """

    axes: tuple[int, ...]
    statistics: str = RUNNING
    eps: float = 1e-5

    @nn.compact
    def __call__(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalises z, in float32."""
        if self.statistics not in (RUNNING, IN_BATCH):
            raise ValueError(f"unknown statistics {self.statistics!r}")
        shape = tuple(1 if axis in self.axes else size for axis, size in enumerate(z.shape))
        moments = self.variable(
            STATS, "moments", lambda: Moments(jnp.zeros(shape), jnp.ones(shape))
        ).value
        if self.is_mutable_collection(MOMENTS) and not self.is_initializing():
            of_batch = Moments(
                jnp.mean(z, self.axes, keepdims=True), jnp.var(z, self.axes, keepdims=True)
            )
            sow_last(self, MOMENTS, "moments", jax.lax.stop_gradient(of_batch))
            if self.statistics == IN_BATCH:
                moments = of_batch
        return (z - moments.mean) * jax.lax.rsqrt(moments.variance + self.eps)


def pooled(parts: Any) -> Any:
    """Moments of a whole from those of its equal parts, stacked along a leading axis."""

    def pool(each: Moments) -> Moments:
        variance = each.variance.mean(0) + each.mean.var(0)
        return Moments(each.mean.mean(0), variance)

    return jax.tree.map(pool, parts, is_leaf=_is_moments)


def updated(stats: Any, moments: Any, momentum: float) -> Any:
    """Running statistics after a step.

    Args:
        stats: the collection "stats", which may hold more than moments.
        moments: the collection "moments" of the step; its paths are among those of `stats`.
        momentum: the step's share; 1 replaces what was there.
    """
    if _is_moments(stats):
        return jax.tree.map(lambda old, new: old + momentum * (new - old), stats, moments)
    if not isinstance(stats, dict):
        return stats
    return {
        name: updated(of_name, moments[name], momentum) if name in moments else of_name
        for name, of_name in stats.items()
    }


def has_moments(stats: Any) -> bool:
    """Whether the collection "stats" of a model holds running moments."""
    return any(map(_is_moments, jax.tree.leaves(stats, is_leaf=_is_moments)))


def _is_moments(node: Any) -> bool:
    return isinstance(node, Moments)
