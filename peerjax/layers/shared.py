"""The shared path: a small dense layer beside every sparse one, usually with one set of weights."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NAME = "shared"


class SharedWeights(NamedTuple):
    """Matrices of the shared path.

    Attributes:
        down: the first matrix.
        up: the second matrix.
    """

    down: Float[Array, "D F"]
    up: Float[Array, "F D"]


class SharedPath(nn.Module):
    """Owns the weights of a shared path, "down" and "up". `apply_shared` computes its output.

    Attributes:
        hidden: F, number of hidden neurons.
        residual_scale: initial scale of the output.
    """

    hidden: int
    residual_scale: float

    @nn.compact
    def __call__(self, width: int) -> SharedWeights:
        """Returns the weights for a model of `width` features, in float32."""
        of_up = nn.initializers.variance_scaling(self.residual_scale**2, "fan_in", "normal")
        return SharedWeights(
            self.param("down", nn.initializers.lecun_normal(), (width, self.hidden)),
            self.param("up", of_up, (self.hidden, width)),
        )


def apply_shared(
    weights: SharedWeights, x_BLD: Float[Array, "B L D"], dtype: jnp.dtype
) -> Float[Array, "B L D"]:
    """Computes `gelu(x down) up` in a dtype, with the exact GELU."""
    # If tokens had two axes, XLA on CPUs would copy transposes for the gradient of weights.
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1]).astype(dtype)
    hidden_TF = jax.nn.gelu(x_TD @ weights.down.astype(dtype), approximate=False)
    return (hidden_TF @ weights.up.astype(dtype)).reshape(x_BLD.shape)
