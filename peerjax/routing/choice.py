"""The result of routing, which later stages can change before experts are looked up."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def largest(scores: Float[Array, "*S M"], count: Int[Array, "*S"]) -> Bool[Array, "*S M"]:
    """Marks the `count` largest scores; of equal ones, the first."""
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    return rank < count[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """The experts of every token. The id N, one beyond the last, means "no expert".

    The choice of a stack of layers has leading axes.

    Attributes:
        ids: expert numbers, integers [*layers, T, K]. N fills the places of a token with fewer
            than K experts.
        gates: weights of the experts, float32 [*layers, T, K].
        num_experts: N, number of experts to choose from.
        hidden_bias: bias that is added to the experts' hidden values, like the gates; or `None`.
        is_routed: whether a router chose. Otherwise all tokens use the same experts. Budgets,
            removal and figures of usage do not apply to these.
    """

    ids: Any  # `Any`, because JAX also makes trees of shapes
    gates: Any
    num_experts: int = dataclasses.field(metadata={"static": True})
    hidden_bias: Any = None
    is_routed: bool = dataclasses.field(default=True, metadata={"static": True})

    def limited(self, budget: Int[Array, "*S T"]) -> Choice:
        """Returns the choice with only the `budget` experts of each token with largest gates."""
        gates = jnp.where(self.ids < self.num_experts, self.gates, -jnp.inf)
        return self._where(largest(gates, budget))

    def without(self, removed: Bool[Array, " N"]) -> Choice:
        """Returns the choice without some experts. The gates of the others do not change."""
        return self._where(~jnp.append(removed, True)[self.ids])

    def among(self, places: int) -> Choice:
        """Returns the same experts in a pool with room for more, where "no expert" is `places`."""
        if places == self.num_experts:
            return self
        ids = jnp.where(self.ids == self.num_experts, places, self.ids)
        return dataclasses.replace(self, ids=ids, num_experts=places)

    def moved(self, metaexpert: Int[Array, "*S T"], total: int, spread: int = 1) -> Choice:
        """Returns the same experts, numbered in the pool that all M metaexperts share.

        Expert n of metaexpert m has the number `v M N / V + m N / V + r` there, with
        `v, r = divmod(n, N / V)`. A range of M N / V numbers thus has equally many experts of each
        metaexpert. With V = 1, the number is `m N + n`. "No expert" becomes `total`.

        Args:
            metaexpert: m of each token.
            total: M N, number of experts in that pool.
            spread: V, a divisor of N, as in `peerjax.routing.product_keys.spread_ids`.
        """
        part, place = jnp.divmod(self.ids, self.num_experts // spread)
        ids = part * (total // spread) + metaexpert[..., None] * (self.num_experts // spread)
        ids = ids + place
        ids = jnp.where(self.ids == self.num_experts, total, ids)
        return dataclasses.replace(self, ids=ids, num_experts=total)

    def addressed(self, addresses: Int[Array, " N"], total: int) -> Choice:
        """Returns the same experts by their numbers in a table. Those without one are left out.

        Args:
            addresses: new number of each expert, or `total` for "no expert".
            total: number of experts that the new numbers choose from.
        """
        ids = jnp.append(addresses, total)[self.ids]
        gates = jnp.where(ids == total, 0, self.gates)
        return dataclasses.replace(self, ids=ids, gates=gates, num_experts=total)

    def expanded(self, times: int) -> Choice:
        """Returns a choice of `times` experts in place of each one, with the same gate.

        Expert i stands for the experts `times * i` to `times * i + times - 1`.
        """
        if times == 1:
            return self
        total = self.num_experts * times
        ids = self.ids[..., None] * times + jnp.arange(times, dtype=self.ids.dtype)
        ids = jnp.where(self.ids[..., None] == self.num_experts, total, ids)
        gates = jnp.broadcast_to(self.gates[..., None], ids.shape)
        shape = (*ids.shape[:-2], -1)
        return dataclasses.replace(
            self, ids=ids.reshape(shape), gates=gates.reshape(shape), num_experts=total
        )

    def gate_sums(self, weight: Float[Array, " T"]) -> Float[Array, "layers N"]:
        """Sums each expert's gates over weighted tokens. The choice must have one leading axis."""
        layers, layer = self.ids.shape[0], jnp.arange(self.ids.shape[0])[:, None, None]
        weighted = self.gates * weight[None, :, None]
        zeros = jnp.zeros((layers, self.num_experts), jnp.float32)
        return zeros.at[layer, self.ids].add(weighted, mode="drop")

    def _where(self, kept: Bool[Array, "*S T K"]) -> Choice:
        return dataclasses.replace(
            self,
            ids=jnp.where(kept, self.ids, self.num_experts),
            gates=jnp.where(kept, self.gates, 0),
        )


class FactoredChoice(NamedTuple):
    """Gates of all n * n experts as two factors. Expert i n + j has gate `sum_h g1_hi g2_hj`.

    Attributes:
        g1: gates of the first halves.
        g2: gates of the second halves.
    """

    g1: Float[Array, "*S H n"]
    g2: Float[Array, "*S H n"]

    @property
    def num_experts(self) -> int:
        """N = n * n, number of experts."""
        return self.g1.shape[-1] ** 2

    def gate_sums(self, weight: Float[Array, " T"]) -> Float[Array, "layers N"]:
        """Sums each expert's gates over weighted tokens. The gates must be [layers, T, H, n]."""
        weighted = self.g1 * weight[None, :, None, None]
        sums = jnp.einsum("lthi,lthj->lij", weighted, self.g2)
        return sums.reshape(-1, self.num_experts)
