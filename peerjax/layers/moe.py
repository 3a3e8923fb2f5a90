"""A mixture of MLP experts: the usual sparse layer, to compare pools with."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from peerjax.routing.auxiliary import EXPERT_IDS, keep_routing, sow_loss, without_removed
from peerjax.routing.expert_blocks import mixture
from peerjax.routing.token_choice import balance_loss, gates_of


class MoE(nn.Module):
    """`sum_j gate_j * act(x down_j) up_j` over the k experts of the largest router logits.

    No token is dropped. Routing is float32; see `peerjax.routing.token_choice` for the gates.

    Sows into the collection "routing" `ids` [T, k] and `gates` [T, k]; into "losses" `balance`,
    its balance loss times `balance_weight`.

    Attributes:
        num_experts: E.
        experts_per_token: k.
        hidden: hidden neurons of an expert.
        balance_weight: of the balance loss.
        activation: "gelu" (exact), "relu" or "relu2".
        residual_scale: scale of the output projections' initial values.
        dtype: compute dtype; parameters are float32.
        implementation: as `peerjax.routing.expert_blocks.mixture` takes it.
    """

    num_experts: int
    experts_per_token: int
    hidden: int
    balance_weight: float
    activation: str
    residual_scale: float
    dtype: jnp.dtype
    implementation: str | None = None

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Applies the layer to every token."""
        width = x_BLD.shape[-1]
        x_TD = x_BLD.reshape(-1, width)
        # Small initial logits: a fresh router gives its choices nearly equal gates.
        init = nn.initializers.normal(0.02)
        router = nn.Dense(self.num_experts, use_bias=False, kernel_init=init, name="router")
        logits_TE = router(x_TD.astype(jnp.float32))
        _, ids_Tk = jax.lax.top_k(jax.lax.stop_gradient(logits_TE), self.experts_per_token)
        ids_Tk = checkpoint_name(ids_Tk, EXPERT_IDS)
        gates_Tk = gates_of(logits_TE, ids_Tk)
        keep_routing(self, ids_Tk, gates_Tk)
        sow_loss(self, "balance", self.balance_weight * balance_loss(logits_TE, ids_Tk))

        def experts(name: str, inputs: int, outputs: int, scale: float) -> Array:
            init = nn.initializers.variance_scaling(scale, "fan_in", "normal", batch_axis=(0,))
            return self.param(name, init, (self.num_experts, inputs, outputs)).astype(self.dtype)

        y_TD = mixture(
            x_TD.astype(self.dtype),
            ids_Tk,
            without_removed(self, ids_Tk, gates_Tk),
            experts("down", width, self.hidden, 1.0),
            experts("up", self.hidden, width, self.residual_scale**2),
            activation=self.activation,
            implementation=self.implementation,
        )
        return y_TD.reshape(x_BLD.shape)
