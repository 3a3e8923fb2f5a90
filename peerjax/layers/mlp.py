"""The dense feed-forward layer."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import activation_by_name


class MLP(nn.Module):
    """`act(x W_down) W_up`, without biases.

    Attributes:
        hidden: number of hidden neurons.
        activation: "gelu" (exact), "relu" or "relu2".
        residual_scale: scale of the output projection's initial values.
        dtype: compute dtype; parameters are float32.
    """

    hidden: int
    activation: str
    residual_scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Applies the layer to every token."""
        init = nn.initializers.variance_scaling(self.residual_scale**2, "fan_in", "normal")
        hidden = nn.Dense(self.hidden, use_bias=False, dtype=self.dtype, name="down")(x_BLD)
        hidden = activation_by_name(self.activation)(hidden)
        up = nn.Dense(
            x_BLD.shape[-1], use_bias=False, dtype=self.dtype, kernel_init=init, name="up"
        )
        return up(hidden)
