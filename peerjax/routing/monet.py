"""Monet's routing: two sides of n keys for each head, each side with a thresholded softmax.

Expert (i, j) of the n * n experts has the gate `g1_i * g2_j`. A key is on if its score, normalised
over a batch, is above a quantile. On average, `top_k` of n Gaussian scores are above it, so no
sorting is needed. Park et al., "Monet: Mixture of Monosemantic Experts for Transformers",
arXiv:2412.04139, section 3.
"""

import functools
import math
import statistics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peerjax.routing.gates import LEAST_SCORE
from peerjax.routing.running import STATS
from peerjax.routing.running_norm import RUNNING, RunningNorm

# The uniformity loss raises smaller mean gates to this before it takes their logarithm.
LEAST_MEAN_GATE = 1e-9
# Smaller gates of a sub-key count as 0 where products of gates are formed.
LEAST_GATE = 1e-30


def keys_per_side(num_experts: int) -> int:
    """Returns n, the square root of the number of experts.

    Raises:
        ValueError: if `num_experts` is not a square number.
    """
    n = max(math.isqrt(max(num_experts, 0)), 1)
    if n * n != num_experts:
        raise ValueError(
            f"{num_experts} experts are not a square number; choose {n**2} or {(n + 1) ** 2}"
        )
    return n


def quantile(num_keys: int, top_k: int) -> float:
    """Returns the normal quantile `Phi^-1(1 - top_k / num_keys)`.

    It is minus infinity if `top_k` equals `num_keys`, so that all keys are on.

    Raises:
        ValueError: if `top_k` is not in 1 .. `num_keys`.
    """
    if not 1 <= top_k <= num_keys:
        raise ValueError(f"top_k={top_k} is not in 1 .. {num_keys}, the number of keys of a side")
    if top_k == num_keys:
        return -math.inf
    return statistics.NormalDist().inv_cdf(1 - top_k / num_keys)


def threshold(normalised: Float[Array, "*S n"], top_k: int) -> Float[Array, "*S 1"]:
    """Returns `min(max_i normalised_i, Phi^-1(1 - top_k / n))`, so the largest key is always on.

    Args:
        normalised: scores of the keys of one side, with mean 0 and variance 1.
        top_k: nominal number of keys of a side that are on, on average over Gaussian scores. The
            rule of the largest key adds `(1 - top_k / n)^n` to it.

    Raises:
        ValueError: if `top_k` is not in 1 .. n.
    """
    largest = jnp.max(normalised, axis=-1, keepdims=True)
    return jnp.minimum(largest, quantile(normalised.shape[-1], top_k))


def gates(
    z: Float[Array, "*S n"], normalised: Float[Array, "*S n"], top_k: int
) -> Float[Array, "*S n"]:
    """Returns the softmax of the raw scores over the keys that are on. Other gates are exactly 0.

    Args:
        z: raw scores.
        normalised: the same scores, normalised. They decide which keys are on, and get no gradient.
        top_k: nominal number of keys that are on; see `threshold`.

    Raises:
        ValueError: if `top_k` is not in 1 .. n.
    """
    on = normalised >= threshold(normalised, top_k)
    return jax.nn.softmax(z, axis=-1, where=on)


def log_gates(gates_THn: Float[Array, "T H n"]) -> Float[Array, "H T n"]:
    """Returns the logarithm of gates, and a very small number for keys that are not on."""
    on_THn = gates_THn > LEAST_GATE  # the derivative of smaller ones would not be finite
    log_THn = jnp.log(jnp.where(on_THn, gates_THn, 1))
    return jnp.where(on_THn, log_THn, 2 * LEAST_SCORE).swapaxes(0, 1)


def uniformity(g1: Float[Array, "*S H n"], g2: Float[Array, "*S H n"]) -> Float[Array, ""]:
    """Returns the loss that spreads use over keys: `-1/(2 H n) sum log(mean gate)`.

    Its best value is log n. This is equation 16, which takes the logarithm of gates that are mostly
    0. Here the mean over tokens is taken first, and clamped at 1e-9. (The values in the paper's
    Table 7 are just above log 512 only with this reading.) For several routers, take the mean.

    Args:
        g1: gates of the first side; all but the last two axes are tokens.
        g2: gates of the second side.
    """

    def of_side(gates: Array) -> Array:
        means = jnp.mean(gates.reshape(-1, *gates.shape[-2:]), axis=0)
        return -jnp.mean(jnp.log(jnp.maximum(means, LEAST_MEAN_GATE)))

    return (of_side(g1) + of_side(g2)) / 2


def ambiguity(g1: Float[Array, "*S H n"], g2: Float[Array, "*S H n"]) -> Float[Array, ""]:
    """Returns the loss that makes choices sharp: the mean of `1 - max gate`.

    The mean is over heads, sides and tokens. This is equation 17, averaged over tokens. For several
    routers, take the mean.

    Args:
        g1: gates of the first side; all but the last two axes are tokens.
        g2: gates of the second side.
    """
    return 1 - (jnp.mean(jnp.max(g1, axis=-1)) + jnp.mean(jnp.max(g2, axis=-1))) / 2


@functools.cache
def mean_square_sum(num_keys: int, top_k: int) -> float:
    """Returns the mean of `sum_i gate_i^2` over standard normal scores, from 1,024 fixed draws.

    Its inverse is the effective number of active keys per head. Initial scales depend on it.
    """
    z = np.random.default_rng(0).standard_normal((1024, num_keys))
    on = z >= np.minimum(z.max(axis=1, keepdims=True), quantile(num_keys, top_k))
    weights = np.where(on, np.exp(z), 0)
    return float(np.mean(np.sum(weights**2, axis=1) / np.sum(weights, axis=1) ** 2))


class MonetRouter(nn.Module):
    """Computes the scores `z1 = W1 x` and `z2 = W2 x`, and the gates of both sides, in float32.

    The paper reuses the gates of a router in four consecutive layers. Normalisation is per head,
    over tokens and keys, without an affine part. Each row of W1 and W2 is a sub-key. They are drawn
    with variance 1 / D, so the scores of a fresh router are about normal. At D = 2,048 the
    deviation is the 0.02 of the published code. Initialisation records the norm of each sub-key in
    the collection "stats".

    Attributes:
        num_experts: N = n^2. Each side has n keys.
        heads: H, routing heads.
        top_k: average number of keys that are on, for each side and head.
        statistics: statistics that normalise the scores, "running" or "in_batch"; see
            `RunningNorm`.
    """

    num_experts: int
    heads: int
    top_k: int
    statistics: str = RUNNING

    @nn.compact
    def __call__(
        self, x: Float[Array, "*S D"]
    ) -> tuple[Float[Array, "*S H n"], Float[Array, "*S H n"]]:
        """Returns `(g1, g2)`, float32.

        Raises:
            ValueError: if `num_experts` is not a square, or `top_k` is not in 1 .. n.
        """
        x_TD = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        g1_THn, g2_THn = self._gates("1", x_TD), self._gates("2", x_TD)
        shape = (*x.shape[:-1], *g1_THn.shape[1:])
        return g1_THn.reshape(shape), g2_THn.reshape(shape)

    def _gates(self, side: str, x_TD: Array) -> Array:
        num_keys, width = keys_per_side(self.num_experts), x_TD.shape[-1]
        init = nn.initializers.normal(width**-0.5)
        keys = self.param(f"w{side}", init, (self.heads * num_keys, width))
        if self.is_initializing():
            per_head = keys.reshape(self.heads, num_keys, width)
            self.variable(STATS, f"initial_norm_w{side}", jnp.linalg.norm, per_head, axis=-1)
        z_THn = (x_TD @ keys.T).reshape(-1, self.heads, num_keys)
        normalised = RunningNorm((0, 2), self.statistics, name=f"norm{side}")(z_THn)
        return gates(z_THn, normalised, self.top_k)
