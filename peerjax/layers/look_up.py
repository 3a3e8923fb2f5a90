"""The lookup of chosen experts: the only module that reads a pool."""

import flax.linen as nn
from jaxtyping import Array, Float

from pallas_kernels.factored_gradient import Tap
from peerjax.layers.spec import Context
from peerjax.routing.auxiliary import keep_choice, removed_experts
from peerjax.routing.choice import Choice
from peerjax.sharding.lookups import sharded_lookup

# A collection that the caller gives, and the name of the one value of each module in it.
TAPS, TAP = "taps", "tap"


class LookUp(nn.Module):
    """Computes `sum_k gate_k * act(down_k . x + bias_k) * up_k` over the chosen experts of a pool.

    The module reads the pool in `context.pools` that has its own name. Of the experts that a router
    chose, a token uses at most `context.budget`, and none that the collection "removed" marks.

    The module sows the resulting choice into "routing". If the collection "taps" is given, its
    gradient is the factored gradient of the pool.

    Attributes:
        activation: "gelu" (exact), "relu" or "relu2".
        implementation: implementation of the lookup; `None` chooses by the platform.
        exchange: how devices that share the pool exchange tokens; `None` chooses by bytes.
    """

    activation: str = "gelu"
    implementation: str | None = None
    exchange: str | None = None

    @nn.compact
    def __call__(
        self, x_TD: Float[Array, "T D"], choice: Choice, context: Context
    ) -> Float[Array, "T D"]:
        """Looks up the experts of every token.

        Raises:
            ValueError: if the layer has no pool of the module's name, or the pool has no room for
                the experts to choose from.
        """
        if self.name not in context.pools:
            raise ValueError(
                f"LookUp(name={self.name!r}) reads no pool of this layer, which has "
                f"{', '.join(context.pools) or 'none'}; name a key of the layer's `pools`"
            )
        pool = context.pools[self.name]
        if choice.num_experts > pool.num_experts:
            raise ValueError(
                f"the choice is among {choice.num_experts} experts, but the pool "
                f"{self.name!r} has {pool.num_experts}"
            )
        if context.budget is not None and choice.is_routed:
            choice = choice.limited(context.budget.reshape(-1))
        if (removed := removed_experts(self)) is not None:
            choice = choice.without(removed)
        keep_choice(self, choice)
        choice = choice.among(pool.num_experts)
        return sharded_lookup(
            pool.at_layer(context.layer),
            choice.ids,
            choice.gates,
            x_TD,
            hidden_bias=choice.hidden_bias,
            activation=self.activation,
            tap=self._tap(choice, x_TD),
            implementation=self.implementation,
            exchange=self.exchange,
        )

    def _tap(self, choice: Choice, x_TD: Array) -> Tap | None:
        if not (self.is_initializing() or self.has_variable(TAPS, TAP)):
            return None
        return self.variable(TAPS, TAP, Tap.zeros_for, choice.ids, x_TD).value
