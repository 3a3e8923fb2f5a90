"""Gates with a threshold a head, with which the number of experts differs between tokens."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from peerjax.routing.auxiliary import sow_last
from peerjax.routing.gates import Gate, jump_relu_gate, passes, threshold_at, threshold_gate
from peerjax.routing.running import FIRST, MOMENTS, STATS, Active, ScoreScale, Threshold

# Name of the counts in "moments", and of the thresholds that follow them in "stats".
ACTIVE = "active"


class JumpReLU(nn.Module):
    """`jump_relu_gate` with thresholds that are learned.

    The parameter "threshold" [H] is in units of the mean active score of the first batch, which is
    5 to 6. Scores grow in training, and with a unit of 1, Adam's steps are too small to follow. The
    first batch sets the thresholds, such that the target is met, and the figures of scores in
    "stats". The thresholds used are never negative.

    In training, the module sows its `Active` counts into "moments".

    Attributes:
        target: wanted number of active experts a token, over all heads.
        bandwidth: bandwidth in deviations of the scores of the first batch.
    """

    target: float
    bandwidth: float

    @nn.compact
    def __call__(self, scores_HTk: Float[Array, "H T k"], training: bool) -> Gate:
        """Returns the gate.

        Args:
            scores_HTk: retrieved scores, without a gradient.
            training: whether thresholds are trained.
        """
        heads = scores_HTk.shape[0]
        threshold = self.param("threshold", nn.initializers.zeros, (heads,), jnp.float32)
        scale = self.variable(STATS, "scale", lambda: ScoreScale(jnp.ones(()), jnp.ones(()))).value
        if self.is_mutable_collection(FIRST) and not self.is_initializing():
            first = jnp.maximum(threshold_at(scores_HTk, self.target / heads), 0)
            mean_active = jnp.mean(scores_HTk, where=scores_HTk > first[:, None, None])
            scale = ScoreScale(mean_active, jnp.std(scores_HTk))
            threshold = first / mean_active
            sow_last(self, FIRST, "threshold", threshold)
            sow_last(self, FIRST, "scale", scale)
        # The gradient passes, so that a negative threshold can rise again.
        threshold += jax.lax.stop_gradient(jnp.maximum(threshold, 0) - threshold)
        threshold *= scale.mean_active
        _sow_active(self, scores_HTk > threshold[:, None, None])
        return jump_relu_gate(
            threshold,
            scale.mean_active,
            self.bandwidth * scale.deviation,
            self.target,
            training,
        )


class RunningThreshold(nn.Module):
    """`threshold_gate` with thresholds that follow the number of active experts of earlier steps.

    They have no gradient. The first batch sets them, such that the target is met. The module reads
    them as `active` of the collection "stats". In training, it sows its `Active` counts into
    "moments".

    Attributes:
        target: wanted number of active experts a token, over all heads.
    """

    target: float

    @nn.compact
    def __call__(self, scores_HTk: Float[Array, "H T k"]) -> Gate:
        """Returns the gate for retrieved scores, which have no gradient."""
        heads = scores_HTk.shape[0]
        wanted = jnp.float32(self.target / heads)

        def fresh() -> Threshold:
            return Threshold(jnp.zeros(heads), jnp.ones(()), wanted)

        threshold = self.variable(STATS, ACTIVE, fresh).value
        if self.is_mutable_collection(FIRST) and not self.is_initializing():
            # The best expert of each token passes in any case.
            value = threshold_at(scores_HTk[:, :, 1:], self.target / heads - 1)
            threshold = Threshold(value, jnp.std(scores_HTk), wanted)
            sow_last(self, FIRST, ACTIVE, threshold)
        _sow_active(self, passes(scores_HTk, threshold.value))
        return threshold_gate(threshold.value)


def _sow_active(module: nn.Module, is_active: Bool[Array, "H T k"]) -> None:
    if module.is_mutable_collection(MOMENTS) and not module.is_initializing():
        experts = jnp.sum(is_active, axis=(1, 2), dtype=jnp.int32)
        sow_last(module, MOMENTS, ACTIVE, Active(experts, jnp.int32(is_active.shape[1])))
