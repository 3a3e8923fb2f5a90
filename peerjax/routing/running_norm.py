"""Batch normalisation for routers in which no token depends on later tokens.

With statistics of the current batch, a token depends on the tokens after it. A change to the last
token of a text then changes the experts that its first tokens choose. Routers here normalise by
running statistics of earlier steps, through which no gradient flows. Each step updates them
afterwards.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peerjax.routing.auxiliary import sow_last
from peerjax.routing.running import FIRST, MOMENTS, STATS, Moments

# A training step normalises by statistics of earlier steps, or by those of its own batch.
RUNNING, IN_BATCH = "running", "in_batch"


class RunningNorm(nn.Module):
    """Computes `(z - mean) / sqrt(variance + eps)`.

    The module reads `moments` of the collection "stats". If the collection "moments" is mutable, as
    in training, the module sows the moments of z there. If "first" is mutable, it normalises z by
    its own moments, and sows them there.

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
        for collection in (MOMENTS, FIRST):
            if self.is_initializing() or not self.is_mutable_collection(collection):
                continue
            of_batch = Moments(
                jnp.mean(z, self.axes, keepdims=True), jnp.var(z, self.axes, keepdims=True)
            )
            sow_last(self, collection, "moments", jax.lax.stop_gradient(of_batch))
            if collection == FIRST or self.statistics == IN_BATCH:
                moments = of_batch
        return (z - moments.mean) * jax.lax.rsqrt(moments.variance + self.eps)
