"""PEER: parameter-efficient expert retrieval (He 2024, arXiv:2407.04153)."""

import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import ACTIVATIONS
from peerjax.layers.look_up import LookUp
from peerjax.layers.spec import (
    Context,
    FeedForward,
    Sizes,
    require_choice,
    require_not_negative,
    require_positive,
)
from peerjax.routing.adaptive_gates import JumpReLU, RunningThreshold
from peerjax.routing.auxiliary import sow_loss
from peerjax.routing.choice import Choice
from peerjax.routing.gates import ADAPTIVE_GATES, GATES, PRODUCT, SOFTMAX, Gate
from peerjax.routing.monet import MonetRouter, log_gates, quantile
from peerjax.routing.product_keys import SubKeys, retrieve, retrieve_by_sub_keys, spread_ids
from peerjax.routing.running import STATS
from peerjax.routing.running_norm import RunningNorm

QUERY_NORMS = ("layernorm", "batchnorm", "none")
POOL, ALWAYS_ON = "pool", "always_on"


@dataclasses.dataclass(frozen=True)
class PeerConfig(FeedForward):
    """The section "peer".

    Attributes:
        num_experts: (N1, N2), sizes of the two sets of sub-keys; a pool has N1 * N2 experts.
        heads: H, routing heads.
        experts_per_head: k, experts that a head retrieves for each token.
        key_width: width of a sub-key, half of a query.
        activation: "gelu" (exact), "relu" or "relu2".
        query_norm: normalisation of queries: "layernorm", "batchnorm" (over the tokens of earlier
            steps) or "none".
        gate: rule for gates. "softmax" uses all retrieved experts. "jumprelu" uses those with a
            score above a learned threshold of their head. "threshold" is the softmax over the
            scores above a threshold that follows the number of active experts. "product" is the
            gate of Monet, whose sub-keys have the width of the model.
        target: mean number of active experts a token, over all heads, of "jumprelu" and
            "threshold".
        bandwidth: width of the window around a threshold of "jumprelu" whose scores give it a
            gradient, in deviations of the scores of the first batch.
        always_on: number of further experts, which every token uses; 0 for none.
        group: number of consecutive blocks that share a router. Each has a pool of its own.
        experts_per_pair: number of experts for each pair of sub-keys, which share its gate.
        kept_pairs: number of pairs that have experts; 0 for all. The others were pruned, and a
            table has the place of each pair in the pool.
        spread: number of parts of a pool over which the experts of each sub-key are spread evenly,
            a divisor of the number of second sub-keys. If the axis `expert` of the mesh divides it,
            the load of devices is more even.
        keys_on: average number of sub-keys of a side and head that "product" lets act.
        biases: whether "product" adds biases from tables: one of each sub-key for the hidden values
            of its experts, and one for the output.
    """

    section: ClassVar[str] = "peer"
    undecayed: ClassVar[tuple[str, ...]] = (
        "hidden_bias1",
        "hidden_bias2",
        "output_bias1",
        "output_bias2",
    )

    num_experts: tuple[int, int] = (256, 256)
    heads: int = 4
    experts_per_head: int = 8
    key_width: int = 64
    activation: str = "gelu"
    query_norm: str = "layernorm"
    gate: str = "softmax"
    target: float = 32.0
    bandwidth: float = 0.1
    always_on: int = 0
    group: int = 1
    experts_per_pair: int = 1
    kept_pairs: int = 0
    spread: int = 1
    keys_on: int = 8
    biases: bool = False

    @property
    def period(self) -> int:
        """Number of consecutive blocks that share a router."""
        return self.group

    @property
    def spread_of_pool(self) -> int:
        """`spread`."""
        return self.spread

    @property
    def num_pairs(self) -> int:
        """Number of pairs of sub-keys."""
        return self.num_experts[0] * self.num_experts[1]

    @property
    def pools(self) -> dict[str, int]:
        """The pool of the retrieved experts, and that of the experts that every token uses."""
        pools = {POOL: (self.kept_pairs or self.num_pairs) * self.experts_per_pair}
        return {**pools, ALWAYS_ON: self.always_on} if self.always_on else pools

    @property
    def is_adaptive(self) -> bool:
        """Whether the number of active experts differs between tokens."""
        return self.gate in ADAPTIVE_GATES

    def check(self, width: int) -> None:
        """Raises a ValueError if a field is out of range or k exceeds the number of experts."""
        require_positive(self, "heads", "experts_per_head", "key_width")
        require_choice(self, "activation", ACTIVATIONS)
        require_choice(self, "query_norm", QUERY_NORMS)
        require_choice(self, "gate", GATES)
        require_positive(self, "target", "bandwidth")
        require_not_negative(self, "always_on", "kept_pairs")
        require_positive(self, "group", "experts_per_pair", "spread")
        if len(self.num_experts) != 2 or not all(
            isinstance(size, int) and size >= 1 for size in self.num_experts
        ):
            raise ValueError(f"peer.num_experts={self.num_experts} is not a pair of positive sizes")
        if (most := self.num_pairs * self.experts_per_pair) < self.experts_per_head:
            raise ValueError(
                f"peer.num_experts={self.num_experts} makes {most} experts, fewer than "
                f"peer.experts_per_head={self.experts_per_head}"
            )
        if self.experts_per_head % self.experts_per_pair:
            raise ValueError(
                f"peer.experts_per_head={self.experts_per_head} is not divisible by "
                f"peer.experts_per_pair={self.experts_per_pair}"
            )
        if self.num_experts[1] % self.spread:
            raise ValueError(
                f"peer.spread={self.spread} does not divide the second of peer.num_experts="
                f"{self.num_experts}"
            )
        if self.spread > 1 and self.kept_pairs:
            raise ValueError(
                f"peer.spread={self.spread} has no effect with peer.kept_pairs={self.kept_pairs}, "
                "because a table numbers the experts; set it to 1"
            )
        if self.kept_pairs > self.num_pairs:
            raise ValueError(
                f"peer.kept_pairs={self.kept_pairs} is more than the {self.num_pairs} pairs of "
                f"peer.num_experts={self.num_experts}"
            )
        if self.gate == "product":
            self._check_product()
        elif self.biases:
            raise ValueError(
                f"peer.biases needs peer.gate='product', but peer.gate={self.gate!r}; set it to "
                "False"
            )
        if self.is_adaptive:
            self._check_target()

    def _check_product(self) -> None:
        n1, n2 = self.num_experts
        if n1 != n2:
            raise ValueError(
                f"peer.num_experts={self.num_experts} has unequal sizes, but peer.gate='product' "
                "needs as many first as second sub-keys"
            )
        try:
            quantile(n1, self.keys_on)
        except ValueError as error:
            raise ValueError(f"peer.keys_on: {error}") from None

    def _check_target(self) -> None:
        if self.experts_per_pair > 1:
            raise ValueError(
                f"peer.gate={self.gate!r} counts single experts, but peer.experts_per_pair="
                f"{self.experts_per_pair}; set it to 1"
            )
        # A threshold always passes the best expert of each head.
        least = self.heads if self.gate == "threshold" else 0
        most = self.heads * self.experts_per_head
        if not least <= self.target < most:
            raise ValueError(
                f"peer.target={self.target:g} is not in [{least}, {most}), the possible means of "
                f"peer.gate={self.gate!r} with peer.heads={self.heads} and "
                f"peer.experts_per_head={self.experts_per_head}; 4 * peer.target / peer.heads "
                "experts a head leave room to adapt"
            )

    def module(self, sizes: Sizes, name: str | None = None) -> "PEER":
        """Builds the layer."""
        return PEER(self, sizes, name=name)

    def flops(self, width: int) -> dict[str, float]:
        """Counts queries and their scores, the sums of retrieval, and the active experts."""
        n1, n2 = self.num_experts
        if self.gate == "product":
            router = 2 * width * self.heads * (n1 + n2)
        else:
            queries = 2 * width * self.heads * 2 * self.key_width
            router = queries + 2 * self.heads * (n1 + n2) * self.key_width
        pairs = min(self._pairs_per_head, n1) * min(self._pairs_per_head, n2)
        return {
            "router": router / self.group,
            "retrieval": self.heads * pairs / self.group,
            "lookup": 2 * self._active * 2 * width,
            **({"always on": 6 * self.always_on * width} if self.always_on else {}),
            **({"biases": 2 * (n1 + n2) * width} if self.biases else {}),
        }

    @property
    def _pairs_per_head(self) -> int:
        return self.experts_per_head // self.experts_per_pair

    @property
    def _active(self) -> float:
        return self.target if self.is_adaptive else self.heads * self.experts_per_head


class Routed(NamedTuple):
    """Routing that the first block of a group passes to the other blocks.

    Attributes:
        choice: the chosen experts.
        pairs: the chosen pairs of sub-keys.
        gate_sums: sums over heads of the gates of first and of second sub-keys [T, n], with the
            gate "product"; else `None`.
    """

    choice: Choice
    pairs: Choice
    gate_sums: tuple[Array, Array] | None = None


class PEER(nn.Module):
    """Computes `sum_h sum_k gate_hk * act(down_hk . x) * up_hk` over retrieved experts.

    Queries are `norm(W_q x)` for each head. The two halves of a query score the two sets of
    sub-keys. Each head retrieves its `experts_per_head` best experts of the product, and the gate
    decides which of them act. Routing is computed in float32.

    With the gate "product", a head has the router of Monet: the sub-keys score x itself, those
    below a quantile of normalised scores do not act, and the gate of a pair is the product of the
    softmaxes of both sides. Gates are not normalised again over the retrieved pairs.

    The pool is `context.pools["pool"]`. `LookUp` documents the collections that are read and
    written. The collection "stats" also has the norm of each sub-key at initialisation, and with
    `kept_pairs` the table "addresses": the place of each pair, or `kept_pairs` for a pruned one.

    With `always_on`, the layer adds the experts of `context.pools["always_on"]`. Their gates are
    `2 * sigmoid(x W) / sqrt(always_on)`, so the sum of their squares is about 1 in a fresh layer.
    """

    config: PeerConfig
    sizes: Sizes

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context, routed: Routed | None = None
    ) -> tuple[Float[Array, "B L D"], Routed]:
        """Applies the layer to every token."""
        config = self.config
        how = (config.activation, self.sizes.implementation, self.sizes.exchange)
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        if routed is None:
            routed = self._route(x_TD.astype(jnp.float32), training=context.step is not None)
        choice = routed.choice
        if config.biases:
            choice = dataclasses.replace(choice, hidden_bias=self._hidden_bias(routed.pairs))
        y_TD = LookUp(*how, name=POOL)(x_TD, choice, context)
        if config.biases:
            y_TD = y_TD + self._output_bias(routed, x_TD.shape[-1]).astype(y_TD.dtype)
        if config.always_on:
            always_on = LookUp(*how, name=ALWAYS_ON)
            y_TD = y_TD + always_on(x_TD, self._always_on(x_TD), context)
        return y_TD.reshape(x_BLD.shape), routed

    def _route(self, x_TD: Array, training: bool) -> Routed:
        config, implementation = self.config, self.sizes.implementation
        count, gate_sums = config.experts_per_head // config.experts_per_pair, None
        if config.gate == "product":
            g1_THn, g2_THn = MonetRouter(
                config.num_pairs, config.heads, config.keys_on, self.sizes.statistics, name="router"
            )(x_TD)
            scores = log_gates(g1_THn), log_gates(g2_THn)
            retrieved = retrieve(*scores, count, implementation)
            gate, gate_sums = PRODUCT, (jnp.sum(g1_THn, axis=1), jnp.sum(g2_THn, axis=1))
        else:
            retrieved = retrieve_by_sub_keys(*self._sub_keys(x_TD), count, implementation)
            gate = self._gate(retrieved.scores_HTk, training)
        pairs, scores_HTk = retrieved.choose(gate)
        if gate.penalty is not None:
            sow_loss(self, "target", gate.penalty(scores_HTk))
        spread = spread_ids(pairs.ids, config.num_experts, config.spread)
        choice = dataclasses.replace(pairs, ids=spread)
        if config.kept_pairs:
            choice = choice.addressed(self._addresses(), config.kept_pairs)
        return Routed(choice.expanded(config.experts_per_pair), pairs, gate_sums)

    def _gate(self, scores_HTk: Array, training: bool) -> Gate:
        config = self.config
        if config.gate == "jumprelu":
            return JumpReLU(config.target, config.bandwidth, name="gate")(scores_HTk, training)
        if config.gate == "threshold":
            return RunningThreshold(config.target, name="gate")(scores_HTk)
        return SOFTMAX

    def _addresses(self) -> Array:
        pairs, kept = self.config.num_pairs, self.config.kept_pairs

        def first_pairs() -> Array:
            return jnp.minimum(jnp.arange(pairs, dtype=jnp.int32), kept)

        return self.variable(STATS, "addresses", first_pairs).value

    def _hidden_bias(self, pairs: Choice) -> Float[Array, "T K"]:
        (n1, n2), m = self.config.num_experts, self.config.experts_per_pair
        ids_TP = jnp.minimum(pairs.ids, n1 * n2 - 1)
        zeros = nn.initializers.zeros
        of_first = self.param("hidden_bias1", zeros, (n1, m))[ids_TP // n2]
        of_second = self.param("hidden_bias2", zeros, (n2, m))[ids_TP % n2]
        return (of_first + of_second).reshape(ids_TP.shape[0], -1)

    def _output_bias(self, routed: Routed, width: int) -> Float[Array, "T D"]:
        assert routed.gate_sums is not None
        (n1, n2), zeros = self.config.num_experts, nn.initializers.zeros
        of_first, of_second = routed.gate_sums
        bias_TD = of_first @ self.param("output_bias1", zeros, (n1, width))
        return bias_TD + of_second @ self.param("output_bias2", zeros, (n2, width))

    def _always_on(self, x_TD: Array) -> Choice:
        count = self.config.always_on
        gate = nn.Dense(count, use_bias=False, name="always_on_gate")
        gates_TK = 2 * nn.sigmoid(gate(x_TD.astype(jnp.float32))) / count**0.5
        ids_TK = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), gates_TK.shape)
        return Choice(ids_TK, gates_TK, count, is_routed=False)

    def _sub_keys(self, x_TD: Array) -> tuple[SubKeys, SubKeys]:
        config = self.config
        features = config.heads * 2 * config.key_width
        query_THd = nn.Dense(features, use_bias=False, name="query")(x_TD)
        query_THd = query_THd.reshape(-1, config.heads, 2 * config.key_width)
        if config.query_norm == "layernorm":
            query_THd = nn.LayerNorm(name="query_norm")(query_THd)
        elif config.query_norm == "batchnorm":
            query_THd = RunningNorm((0,), self.sizes.statistics, name="query_norm")(query_THd)

        def side(name: str, query_THd: Array, num_keys: int) -> SubKeys:
            init = nn.initializers.normal(config.key_width**-0.5)
            keys_HNd = self.param(name, init, (config.heads, num_keys, config.key_width))
            if self.is_initializing():
                self.variable(STATS, f"initial_norm_{name}", jnp.linalg.norm, keys_HNd, axis=-1)
            return SubKeys(query_THd, keys_HNd)

        first, second = jnp.split(query_THd, 2, axis=-1)
        return (
            side("keys1", first, config.num_experts[0]),
            side("keys2", second, config.num_experts[1]),
        )
