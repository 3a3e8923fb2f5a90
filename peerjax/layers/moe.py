"""A mixture of MLP experts, the usual sparse layer, for comparison with pools."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.activations import ACTIVATIONS
from peerjax.layers.spec import (
    Context,
    FeedForward,
    Sizes,
    require_choice,
    require_not_negative,
    require_positive,
)
from peerjax.routing.auxiliary import EXPERT_IDS, keep_choice, removed_experts, sow_loss
from peerjax.routing.choice import Choice
from peerjax.routing.expert_blocks import mixture
from peerjax.routing.token_choice import balance_loss, gates_of


@dataclasses.dataclass(frozen=True)
class MoeConfig(FeedForward):
    """The section "moe".

    Attributes:
        num_experts: E, experts of a layer.
        experts_per_token: k, experts that each token uses.
        hidden: hidden neurons of an expert.
        activation: "gelu" (exact), "relu" or "relu2".
        balance_weight: weight of the loss that spreads tokens over experts; 0 means no loss.
    """

    section: ClassVar[str] = "moe"

    num_experts: int = 8
    experts_per_token: int = 2
    hidden: int = 256
    activation: str = "gelu"
    balance_weight: float = 1e-2

    def check(self, width: int) -> None:
        """Raises a ValueError if a field is out of range or k exceeds the number of experts."""
        require_positive(self, "num_experts", "experts_per_token", "hidden")
        require_not_negative(self, "balance_weight")
        require_choice(self, "activation", ACTIVATIONS)
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"moe.experts_per_token={self.experts_per_token} is more than "
                f"moe.num_experts={self.num_experts}"
            )

    def module(self, sizes: Sizes, name: str | None = None) -> "MoE":
        """Builds the layer."""
        return MoE(self, sizes, name=name)

    def flops(self, width: int) -> dict[str, float]:
        """Counts the router and the chosen experts, without the padding of blocks."""
        return {
            "router": 2 * width * self.num_experts,
            "experts": self.experts_per_token * 4 * width * self.hidden,
        }


class MoE(nn.Module):
    """Computes `sum_j gate_j * act(x down_j) up_j` over the k experts with the largest logits.

    No token is dropped. Routing is computed in float32. `peerjax.routing.token_choice` defines the
    gates.

    The layer sows its choice into the collection "routing". It sows its balance loss, times
    `balance_weight`, into "losses" as `balance`.
    """

    config: MoeConfig
    sizes: Sizes

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context, routed: None = None
    ) -> tuple[Float[Array, "B L D"], None]:
        """Applies the layer to every token."""
        config, width = self.config, x_BLD.shape[-1]
        dtype = jnp.dtype(self.sizes.dtype)
        x_TD = x_BLD.reshape(-1, width)
        # Initial logits are small, so the gates of a fresh router are nearly equal.
        init = nn.initializers.normal(0.02)
        router = nn.Dense(config.num_experts, use_bias=False, kernel_init=init, name="router")
        logits_TE = router(x_TD.astype(jnp.float32))
        _, ids_Tk = jax.lax.top_k(jax.lax.stop_gradient(logits_TE), config.experts_per_token)
        ids_Tk = checkpoint_name(ids_Tk, EXPERT_IDS)
        choice = Choice(ids_Tk, gates_of(logits_TE, ids_Tk), config.num_experts)
        sow_loss(self, "balance", config.balance_weight * balance_loss(logits_TE, ids_Tk))
        if (removed := removed_experts(self)) is not None:
            choice = choice.without(removed)
        keep_choice(self, choice)

        def experts(name: str, inputs: int, outputs: int, scale: float) -> Array:
            init = nn.initializers.variance_scaling(scale, "fan_in", "normal", batch_axis=(0,))
            return self.param(name, init, (config.num_experts, inputs, outputs)).astype(dtype)

        y_TD = mixture(
            x_TD.astype(dtype),
            ids_Tk,  # a removed expert is computed too, but its gate is 0
            choice.gates,
            experts("down", width, config.hidden, 1.0),
            experts("up", config.hidden, width, self.sizes.residual_scale**2),
            activation=config.activation,
            implementation=self.sizes.implementation,
        )
        return y_TD.reshape(x_BLD.shape), routed
