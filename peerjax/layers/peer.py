"""PEER: parameter-efficient expert retrieval (He 2024, arXiv:2407.04153)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.factored_gradient import Tap
from peerjax.pool import ExpertPool
from peerjax.routing.auxiliary import EXPERT_IDS, keep_routing, without_removed
from peerjax.routing.product_keys import pair_scores, top_k_pairs
from peerjax.routing.running_norm import RUNNING, STATS, RunningNorm
from peerjax.sharding.pools import sharded_lookup


class PEER(nn.Module):
    """`sum_h sum_k softmax(score)_hk * act(down_hk . x) * up_hk` over retrieved experts.

    Queries are `norm(W_q x)` per head, split in halves that score the two sets of sub-keys;
    each head retrieves its `experts_per_head` best experts of the product. Routing is float32.

    Sows into the collection "routing": `ids` [T, K] and `gates` [T, K]. Reads, where it is
    given, the collection "taps", whose gradient is the factored gradient of the pool.
    Initialisation also records each sub-key's norm in the collection "stats".

    Attributes:
        num_experts: (N1, N2), sizes of the two sets of sub-keys.
        heads: H, routing heads.
        experts_per_head: k.
        key_width: width of a sub-key.
        activation: "gelu" (exact), "relu" or "relu2".
        query_norm: "layernorm", "batchnorm" (over the tokens of earlier steps) or "none".
        statistics: of "batchnorm", as `peerjax.routing.running_norm.RunningNorm` takes it.
        implementation: of the lookup; `None` chooses by the platform.
    """

    num_experts: tuple[int, int]
    heads: int
    experts_per_head: int
    key_width: int
    activation: str = "gelu"
    query_norm: str = "layernorm"
    statistics: str = RUNNING
    implementation: str | None = None

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], pool: ExpertPool) -> Float[Array, "B L D"]:
        """Applies the layer to every token, with experts from `pool`."""
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        scores1_HTN, scores2_HTM = self._sub_key_scores(x_TD.astype(jnp.float32))
        ids_HTk = top_k_pairs(
            jax.lax.stop_gradient(scores1_HTN),
            jax.lax.stop_gradient(scores2_HTM),
            self.experts_per_head,
        )
        ids_HTk = checkpoint_name(ids_HTk, EXPERT_IDS)
        gates_HTk = jax.nn.softmax(pair_scores(scores1_HTN, scores2_HTM, ids_HTk), axis=-1)

        ids_TK = ids_HTk.swapaxes(0, 1).reshape(x_TD.shape[0], -1)
        gates_TK = gates_HTk.swapaxes(0, 1).reshape(ids_TK.shape)
        keep_routing(self, ids_TK, gates_TK)
        tap = self._tap(ids_TK, x_TD)
        y_TD = sharded_lookup(
            pool,
            ids_TK,
            without_removed(self, ids_TK, gates_TK),
            x_TD,
            activation=self.activation,
            tap=tap,
            implementation=self.implementation,
        )
        return y_TD.reshape(x_BLD.shape)

    def _sub_key_scores(self, x_TD: Array) -> tuple[Array, Array]:
        features = self.heads * 2 * self.key_width
        query_THd = nn.Dense(features, use_bias=False, name="query")(x_TD)
        query_THd = query_THd.reshape(-1, self.heads, 2 * self.key_width)
        if self.query_norm == "layernorm":
            query_THd = nn.LayerNorm(name="query_norm")(query_THd)
        elif self.query_norm == "batchnorm":
            query_THd = RunningNorm((0,), self.statistics, name="query_norm")(query_THd)
        elif self.query_norm != "none":
            raise ValueError(f"unknown query_norm {self.query_norm!r}")

        def scores(name: str, query: Array, num_keys: int) -> Array:
            init = nn.initializers.normal(self.key_width**-0.5)
            keys = self.param(name, init, (self.heads, num_keys, self.key_width))
            if self.is_initializing():
                self.variable(STATS, f"initial_norm_{name}", jnp.linalg.norm, keys, axis=-1)
            # Heads first, as in the keys: the scores are the largest arrays of a step, and with
            # tokens first XLA on CPU would write them down once more in another order.
            return jnp.einsum("thd,hnd->htn", query, keys)

        first, second = jnp.split(query_THd, 2, axis=-1)
        return (
            scores("keys1", first, self.num_experts[0]),
            scores("keys2", second, self.num_experts[1]),
        )

    def _tap(self, ids_TK: Array, x_TD: Array) -> Tap | None:
        if not (self.is_initializing() or self.has_variable("taps", "pool")):
            return None
        return self.variable("taps", "pool", Tap.zeros_for, ids_TK, x_TD).value
