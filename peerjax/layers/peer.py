"""PEER: parameter-efficient expert retrieval (He 2024, arXiv:2407.04153)."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import ACTIVATIONS
from peerjax.layers.look_up import LookUp
from peerjax.layers.spec import Context, FeedForward, Sizes, require_choice, require_positive
from peerjax.routing.product_keys import SubKeys, sub_key_choice
from peerjax.routing.running_norm import STATS, RunningNorm

QUERY_NORMS = ("layernorm", "batchnorm", "none")
POOL = "pool"


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
    """

    section: ClassVar[str] = "peer"

    num_experts: tuple[int, int] = (256, 256)
    heads: int = 4
    experts_per_head: int = 8
    key_width: int = 64
    activation: str = "gelu"
    query_norm: str = "layernorm"

    @property
    def pools(self) -> dict[str, int]:
        """The one pool of the layer."""
        return {POOL: self.num_experts[0] * self.num_experts[1]}

    def check(self, width: int) -> None:
        """Raises a ValueError if a field is out of range or k exceeds the number of experts."""
        require_positive(self, "heads", "experts_per_head", "key_width")
        require_choice(self, "activation", ACTIVATIONS)
        require_choice(self, "query_norm", QUERY_NORMS)
        if len(self.num_experts) != 2 or not all(
            isinstance(size, int) and size >= 1 for size in self.num_experts
        ):
            raise ValueError(f"peer.num_experts={self.num_experts} is not a pair of positive sizes")
        if self.pools[POOL] < self.experts_per_head:
            raise ValueError(
                f"peer.num_experts={self.num_experts} makes {self.pools[POOL]} experts, fewer than "
                f"peer.experts_per_head={self.experts_per_head}"
            )

    def module(self, sizes: Sizes, name: str | None = None) -> "PEER":
        """Builds the layer."""
        return PEER(self, sizes, name=name)

    def flops(self, width: int) -> dict[str, float]:
        """Counts queries and their scores, the sums of retrieval, and the experts."""
        n1, n2 = self.num_experts
        queries = 2 * width * self.heads * 2 * self.key_width
        scores = 2 * self.heads * (n1 + n2) * self.key_width
        pairs = min(self.experts_per_head, n1) * min(self.experts_per_head, n2)
        return {
            "router": queries + scores,
            "retrieval": self.heads * pairs,
            "lookup": 2 * self.heads * self.experts_per_head * 2 * width,
        }


class PEER(nn.Module):
    """Computes `sum_h sum_k softmax(score)_hk * act(down_hk . x) * up_hk` over retrieved experts.

    Queries are `norm(W_q x)` for each head. The two halves of a query score the two sets of
    sub-keys. Each head retrieves its `experts_per_head` best experts of the product. Routing is
    computed in float32.

    The pool is `context.pools["pool"]`. `LookUp` documents the collections that are read and
    written. Initialisation also records the norm of each sub-key in the collection "stats".
    """

    config: PeerConfig
    sizes: Sizes

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context, routed: None = None
    ) -> tuple[Float[Array, "B L D"], None]:
        """Applies the layer to every token."""
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        sides = self._sub_keys(x_TD.astype(jnp.float32))
        choice = sub_key_choice(
            *sides, self.config.experts_per_head, implementation=self.sizes.implementation
        )
        look_up = LookUp(self.config.activation, self.sizes.implementation, name=POOL)
        return look_up(x_TD, choice, context).reshape(x_BLD.shape), routed

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
