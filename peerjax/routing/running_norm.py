"""Batch normalisation for routers in which no token depends on later tokens.

With statistics of the current batch, a token depends on the tokens after it. A change to the last
token of a text then changes the experts that its first tokens choose. Routers here normalise by
running statistics of earlier steps, through which no gradient flows. Each step updates them
afterwards.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peerjax.routing.auxiliary import sow_last

# Collections: the statistics that a layer reads, and the moments of the current batch.
STATS, MOMENTS = "stats", "moments"
# A training step normalises by statistics of earlier steps, or by those of its own batch.
RUNNING, IN_BATCH = "running", "in_batch"


class Moments(NamedTuple):
    """Mean and variance of a batch, or running ones over steps."""

    mean: Array
    variance: Array


class RunningNorm(nn.Module):
    """Computes `(z - mean) / sqrt(variance + eps)`.

    The module reads `moments` of the collection "stats". If the collection "moments" is mutable, as
    in training, the module sows the moments of z there.

    Attributes:
        axes: axes of z that share one mean and one variance. They include the tokens.
        statistics: "running" or "in_batch". With "in_batch", training normalises z by its own
            moments, and the gradient includes them. This leaks later tokens into earlier ones. Use
            it only for comparison with the papers.
        eps: number that is added to the variance.
    """

    axes: tuple[int, ...]
    statistics: str = RUNNING
    eps: float = 1e-5

    @nn.compact
    def __call__(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalises z, in float32."""
        if self.statistics not in (RUNNING, IN_BATCH):
            raise ValueError(
                f"unknown statistics {self.statistics!r}; choose 'running' or 'in_batch'"
            )
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
    """Returns the moments of a whole from those of its equal parts, stacked on a leading axis."""

    def pool(each: Moments) -> Moments:
        variance = each.variance.mean(0) + each.mean.var(0)
        return Moments(each.mean.mean(0), variance)

    return jax.tree.map(pool, parts, is_leaf=_is_moments)


def updated(stats: Any, moments: Any, momentum: float) -> Any:
    """Returns the running statistics after a step.

    Args:
        stats: the collection "stats", which may contain more than moments.
        moments: the collection "moments" of the step. Its paths are among those of `stats`.
        momentum: weight of the step; 1 replaces the old statistics.
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
    """Returns whether the collection "stats" of a model contains running moments."""
    return any(map(_is_moments, jax.tree.leaves(stats, is_leaf=_is_moments)))


def _is_moments(node: Any) -> bool:
    return isinstance(node, Moments)
