"""The dense feed-forward layer."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import ACTIVATIONS, activation_by_name
from peerjax.layers.spec import Context, FeedForward, Sizes, require_choice, require_positive


@dataclasses.dataclass(frozen=True)
class DenseConfig(FeedForward):
    """The section "mlp": a dense layer of two matrices.

    Attributes:
        hidden: number of hidden neurons.
        activation: "gelu" (exact), "relu" or "relu2".
    """

    section: ClassVar[str] = "mlp"
    is_sparse: ClassVar[bool] = False

    hidden: int = 512
    activation: str = "gelu"

    def check(self, width: int) -> None:
        """Raises a ValueError if a field is out of range."""
        require_positive(self, "hidden")
        require_choice(self, "activation", ACTIVATIONS)

    def module(self, sizes: Sizes, name: str | None = None) -> "MLP":
        """Builds the layer."""
        return MLP(self, sizes, name=name)

    def flops(self, width: int) -> dict[str, float]:
        """Counts both matrices."""
        return {"mlp": 4 * width * self.hidden}


class MLP(nn.Module):
    """Computes `act(x W_down) W_up`, without biases.

    "down" is the first matrix and "up" the second, like `down` and `up` of an expert. Llama's names
    are the other way round, so its `up_proj` is the first matrix.
    """

    config: DenseConfig
    sizes: Sizes

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context, routed: None = None
    ) -> tuple[Float[Array, "B L D"], None]:
        """Applies the layer to every token."""
        dtype = jnp.dtype(self.sizes.dtype)
        scale = self.sizes.residual_scale
        init = nn.initializers.variance_scaling(scale**2, "fan_in", "normal")
        # If tokens had two axes, XLA on CPUs would copy transposes for the gradient of weights.
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        hidden_TF = nn.Dense(self.config.hidden, use_bias=False, dtype=dtype, name="down")(x_TD)
        hidden_TF = activation_by_name(self.config.activation)(hidden_TF)
        up = nn.Dense(x_BLD.shape[-1], use_bias=False, dtype=dtype, kernel_init=init, name="up")
        return up(hidden_TF).reshape(x_BLD.shape), routed
