"""Rules that turn the scores of retrieved experts into gates.

Scores are [H, T, k]: those of the k experts that a head retrieves for a token, best first. An
expert that is left out has the lowest finite score.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# The values of `peer.gate`.
GATES = ("softmax", "jumprelu", "threshold", "product")
ADAPTIVE_GATES = ("jumprelu", "threshold")
# Scores of pairs with a sub-key that does not act are below it.
LEAST_SCORE = -1e30


class Gate(NamedTuple):
    """A rule for gates.

    Attributes:
        weigh: function from scores to gates, both float32 [H, T, k]. It must be differentiable.
        is_kept: function from scores to booleans [H, T, k]. An expert that is not kept gets the id
            that lookups skip. `None` keeps all experts.
        penalty: function from scores to a term of the loss; `None` for no term.
    """

    weigh: Callable[[Array], Array]
    is_kept: Callable[[Array], Array] | None = None
    penalty: Callable[[Array], Array] | None = None


# The softmax over a head's experts, as in PEER (arXiv:2407.04153, section 2.1).
SOFTMAX = Gate(partial(jax.nn.softmax, axis=-1))


# The product of the gates of both sub-keys, from the sum of their logarithms, as in Monet
# (arXiv:2412.04139, section 3). Pairs with a sub-key that does not act are left out.
PRODUCT = Gate(jnp.exp, lambda scores: scores > LEAST_SCORE)


def jump_relu_gate(
    threshold: Float[Array, " H"],
    mean_active: Float[Array, ""],
    bandwidth: Float[Array, ""],
    target: float,
    training: bool,
) -> Gate:
    """Returns the gate `jump_relu(z) / (mean_active * target / H)`.

    The gates of a token sum to about H, the number of heads, as those of a softmax do. In training,
    the gate also keeps the experts within half a bandwidth below the threshold. Their gates are 0,
    but the gradient of the threshold needs their outputs.

    The penalty is `(active / target - 1)^2`, where `active` is the mean number of active experts a
    token. Its gradient reaches only the thresholds.

    Args:
        threshold: threshold of each head.
        mean_active: mean score of active experts in the first batch.
        bandwidth: width of the window around the threshold that has a gradient.
        target: wanted number of active experts a token, over all heads.
        training: whether to keep the experts within the window.
    """
    heads = threshold.shape[0]
    of_head = threshold[:, None, None]

    def penalty(scores: Array) -> Array:
        active_HTk = step_function(jax.lax.stop_gradient(scores), of_head, bandwidth)
        return jnp.square(jnp.sum(active_HTk) / (scores.shape[1] * target) - 1)

    return Gate(
        weigh=lambda scores: jump_relu(scores, of_head, bandwidth) * heads / (mean_active * target),
        is_kept=lambda scores: scores > (of_head - bandwidth / 2 if training else of_head),
        penalty=penalty,
    )


def threshold_gate(threshold: Float[Array, " H"]) -> Gate:
    """Returns the softmax over the scores above a threshold. A head's best expert always passes.

    References:
        "Expert Threshold Routing", arXiv:2603.11535.
    """
    return Gate(SOFTMAX.weigh, partial(passes, threshold=threshold))


def passes(scores: Float[Array, "H T k"], threshold: Float[Array, " H"]) -> Bool[Array, "H T k"]:
    """Returns whether a score is above the threshold of its head or is the head's best."""
    return (scores > threshold[:, None, None]) | (jnp.arange(scores.shape[-1]) == 0)


def threshold_at(scores: Float[Array, "H T k"], wanted: float) -> Float[Array, " H"]:
    """Returns a threshold of each head, above which it has `wanted` scores a token on average.

    Args:
        scores: scores of a batch.
        wanted: mean number of scores a token of each head, in [0, k].
    """
    heads, tokens, k = scores.shape
    descending = jnp.sort(scores.reshape(heads, tokens * k), axis=-1, descending=True)
    above = round(wanted * tokens)
    if above == 0:
        return descending[:, 0]
    if above == tokens * k:
        return descending[:, -1] - 1
    return (descending[:, above - 1] + descending[:, above]) / 2


def jump_relu(
    z: Float[Array, "*S"], threshold: Float[Array, "..."], bandwidth: Float[Array, ""]
) -> Float[Array, "*S"]:
    """Returns z above the threshold, and 0 elsewhere.

    The derivative by z is 1 above the threshold. That by the threshold is a surrogate,
    `-threshold / bandwidth` within half a bandwidth of the threshold and 0 elsewhere.

    References:
        Rajamanoharan et al., "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse
        Autoencoders", arXiv:2407.14435, eq. 11.
    """
    slope = -threshold * _window(z, threshold, bandwidth)
    return jnp.where(z > threshold, z, 0) + _without_value(slope, threshold)


def step_function(
    z: Float[Array, "*S"], threshold: Float[Array, "..."], bandwidth: Float[Array, ""]
) -> Float[Array, "*S"]:
    """Returns 1 above the threshold, and 0 elsewhere.

    The derivative by z is 0. That by the threshold is a surrogate, `-1 / bandwidth` within half a
    bandwidth of the threshold and 0 elsewhere.

    References:
        Rajamanoharan et al., arXiv:2407.14435, eq. 12.
    """
    slope = -_window(z, threshold, bandwidth)
    return (z > threshold).astype(z.dtype) + _without_value(slope, threshold)


def _window(z: Array, threshold: Array, bandwidth: Array) -> Array:
    """Returns 1 / bandwidth within half a bandwidth of the threshold, and 0 elsewhere."""
    return jnp.where(jnp.abs(z - threshold) < bandwidth / 2, 1 / bandwidth, 0)


def _without_value(slope: Array, x: Array) -> Array:
    """Returns zeros whose derivative by x is `slope`."""
    return jax.lax.stop_gradient(slope) * (x - jax.lax.stop_gradient(x))
