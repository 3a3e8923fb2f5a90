"""The decoder: puts layers together as a configuration says."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peerjax.layers.attention import Attention, KVCache, same_document, seen
from peerjax.layers.mlp import MLP
from peerjax.layers.moe import MoE
from peerjax.layers.monet import MonetHD, MonetVD
from peerjax.layers.peer import PEER
from peerjax.pool import ExpertPool, initialize_pool
from peerjax.routing.auxiliary import (
    EXPERT_IDS,
    LOSSES,
    REMOVED,
    ROUTING,
    keep_factored_routing,
    removed_experts,
    sow_loss,
)
from peerjax.routing.monet import MonetRouter, ambiguity, uniformity
from peerjax.routing.running_norm import MOMENTS, RUNNING, STATS

# The kinds of feed-forward layer that `ModelConfig.layers` may name. To add one: write its
# module in `peerjax/layers/`, name it here, and give it a branch in `Block.feed_forward`.
DENSE, PEER_KIND, MOE_KIND, MONET_HD, MONET_VD = "dense", "peer", "moe", "monet_hd", "monet_vd"
KINDS = (DENSE, PEER_KIND, MOE_KIND, MONET_HD, MONET_VD)
KINDS_WITH_POOL = (PEER_KIND,)
MONETS = {MONET_HD: MonetHD, MONET_VD: MonetVD}


@dataclasses.dataclass(frozen=True)
class PeerConfig:
    """Fields of a PEER layer; see `peerjax.layers.peer.PEER`."""

    num_experts: tuple[int, int]
    heads: int
    experts_per_head: int
    key_width: int
    activation: str
    query_norm: str


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Fields of a mixture of experts; see `peerjax.layers.moe.MoE`."""

    num_experts: int
    experts_per_token: int
    hidden: int
    balance_weight: float


@dataclasses.dataclass(frozen=True)
class MonetConfig:
    """Fields of Monet's layers; see `peerjax.layers.monet` and `peerjax.routing.monet`."""

    num_experts: int
    expert_width: int
    heads: int
    top_k: int
    group: int
    uniformity_weight: float
    ambiguity_weight: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder is made of; `peerjax.config` documents the fields."""

    vocab_size: int
    width: int
    layers: tuple[tuple[str, int], ...]
    heads: int
    mlp_width: int
    activation: str
    rope_base: float
    dtype: str
    remat: bool
    peer: PeerConfig
    moe: MoeConfig
    monet: MonetConfig
    pool_storage: str
    routing_statistics: str = RUNNING  # of routers with batch normalisation
    implementation: str | None = None  # of lookups and mixtures

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(count for _, count in self.layers)

    @property
    def residual_scale(self) -> float:
        """Initial scale of what a sub-layer adds, so that the stream's variance stays O(1)."""
        return (2 * self.depth) ** -0.5

    @property
    def monet_routers(self) -> int:
        """Number of Monet's routers."""
        return sum(count // self.monet.group for kind, count in self.layers if kind in MONETS)

    def experts_by_run(self) -> dict[str, int]:
        """Number of experts a layer of each run `run_<i>` whose layers route."""
        n1, n2 = self.peer.num_experts
        of_kind = {PEER_KIND: n1 * n2, MOE_KIND: self.moe.num_experts}
        of_kind |= dict.fromkeys(MONETS, self.monet.num_experts)
        kinds = enumerate(kind for kind, _ in self.layers)
        return {f"run_{index}": of_kind[kind] for index, kind in kinds if kind in of_kind}


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream.

    The first block of a group that shares a router has it, and hands its gates on.
    """

    config: ModelConfig
    kind: str

    @nn.compact
    def __call__(self, carry, positions_BL, mask, pool, layer, gates=None):
        """Maps `(x, cache)`, and gives the gates; `layer` is the index in stacks."""
        x_BLD, cache = carry
        config = self.config
        dtype = jnp.dtype(config.dtype)
        attention = Attention(
            config.heads, config.rope_base, config.residual_scale, dtype, name="attention"
        )
        normed = nn.RMSNorm(dtype=config.dtype, name="attention_norm")(x_BLD)
        mixed, cache = attention(normed, positions_BL, mask, cache, layer)
        x_BLD = x_BLD + mixed
        normed = nn.RMSNorm(dtype=config.dtype, name="feed_forward_norm")(x_BLD)
        y_BLD, gates = self.feed_forward(normed, pool, layer, gates)
        return (x_BLD + y_BLD, cache), gates

    def feed_forward(self, x_BLD, pool, layer, gates):
        """The feed-forward layer of this block's kind, and gates that the next block shares."""
        if self.kind in MONETS:
            return self._monet(x_BLD, gates)
        return self._of_one_block(x_BLD, pool, layer), None

    def _of_one_block(self, x_BLD, pool, layer):
        config = self.config
        if self.kind == PEER_KIND:
            fields = dataclasses.asdict(config.peer)
            peer = PEER(
                **fields,
                statistics=config.routing_statistics,
                implementation=config.implementation,
                name="peer",
            )
            return peer(x_BLD, pool.at_layer(layer))
        dtype = jnp.dtype(config.dtype)
        if self.kind == MOE_KIND:
            moe = MoE(
                **dataclasses.asdict(config.moe),
                activation=config.activation,
                residual_scale=config.residual_scale,
                dtype=dtype,
                implementation=config.implementation,
                name="moe",
            )
            return moe(x_BLD)
        mlp = MLP(config.mlp_width, config.activation, config.residual_scale, dtype, name="mlp")
        return mlp(x_BLD)

    def _monet(self, x_BLD, gates):
        monet = self.config.monet
        routed = {"num_experts": monet.num_experts, "heads": monet.heads, "top_k": monet.top_k}
        if gates is None:
            statistics = self.config.routing_statistics
            gates = MonetRouter(**routed, statistics=statistics, name="router")(x_BLD)
            keep_factored_routing(self, *gates)
            share = 1 / self.config.monet_routers
            for name, weight, loss in (
                ("uniformity", monet.uniformity_weight, uniformity),
                ("ambiguity", monet.ambiguity_weight, ambiguity),
            ):
                sow_loss(self, name, share * weight * loss(*gates))
            gates = (*gates, removed_experts(self))
        experts = MONETS[self.kind](
            **routed,
            expert_width=monet.expert_width,
            residual_scale=self.config.residual_scale,
            dtype=jnp.dtype(self.config.dtype),
            name="monet",
        )
        return experts(x_BLD, *gates), gates


class Group(nn.Module):
    """Blocks of Monet that share a router, one after the other."""

    config: ModelConfig
    kind: str

    @nn.compact
    def __call__(self, carry, positions_BL, mask, pool, group):
        """As `Block`; `group` is the number of the group in its run."""
        gates = None
        size = self.config.monet.group
        for number in range(size):
            block = Block(self.config, self.kind, name=f"block_{number}")
            carry, gates = block(carry, positions_BL, mask, pool, group * size + number, gates)
        return carry, None


class Run(nn.Module):
    """A run of equal blocks, scanned block by block or group by group; owns their pools."""

    config: ModelConfig
    kind: str
    length: int

    @nn.compact
    def __call__(self, x_BLD, positions_BL, mask, cache):
        """Returns the stream after the run, and the run's cache if there is one."""
        pool = None
        if self.kind in KINDS_WITH_POOL:
            pool = self.variable("pools", "pool", self._initialize_pool).value
        grouped = self.kind in MONETS
        unit = Group if grouped else Block
        length = self.length // self.config.monet.group if grouped else self.length
        if self.config.remat:
            policy = jax.checkpoint_policies.save_only_these_names(EXPERT_IDS)
            unit = nn.remat(unit, policy=policy, prevent_cse=False)
        units = nn.scan(
            unit,
            variable_axes=dict.fromkeys(
                ("params", STATS, MOMENTS, "taps", ROUTING, LOSSES, REMOVED), 0
            ),
            split_rngs={"params": True},
            # The pool is closed over: as a scanned input it would be copied layer by layer.
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=length,
        )(self.config, self.kind, name="group" if grouped else "block")
        (x_BLD, cache), _ = units((x_BLD, cache), positions_BL, mask, pool, jnp.arange(length))
        return x_BLD, cache

    def _initialize_pool(self) -> ExpertPool:
        peer = self.config.peer
        return initialize_pool(
            self.make_rng("params"),
            self.length,
            peer.num_experts[0] * peer.num_experts[1],
            self.config.width,
            residual_scale=self.config.residual_scale,
            storage=self.config.pool_storage,
        )


class Decoder(nn.Module):
    """A causal language model over packed documents.

    Collections: "params" (float leaves), "pools" (`run_<i>/pool`, the stacked `ExpertPool` of
    run i); "stats" and "moments" as `peerjax.routing.running_norm` says, "taps" as
    `peerjax.layers.peer.PEER`, "routing", "losses" and "removed" as `peerjax.routing.auxiliary`,
    stacked over the blocks of a run.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        cache: dict[str, KVCache] | None = None,
        only: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B _ V"] | tuple[Float[Array, "B _ V"], dict[str, KVCache]]:
        """Returns the logits of the next token, float32.

        Args:
            tokens_BL: token numbers.
            positions_BL: position of each token in its document.
            segments_BL: which document of its row each token belongs to; by default, every row
                is of one.
            cache: as `empty_cache` makes it, or from an earlier call: then a row goes on with its
                document at `positions_BL`, and `(logits, cache)` is returned. What is written at
                a position is seen from there on, until it is overwritten.
            only: the one place of each row whose logits are wanted; then L is 1 in the logits.
        """
        config = self.config
        embed = nn.Embed(
            config.vocab_size,
            config.width,
            dtype=config.dtype,
            embedding_init=nn.initializers.normal(1.0),
            name="embed",
        )
        x_BLD = embed(tokens_BL)
        if cache is not None:
            mask = seen(positions_BL, next(iter(cache.values())).key.shape[2])
        else:
            mask = same_document(jnp.zeros_like(tokens_BL) if segments_BL is None else segments_BL)
        caches = {}
        for index, (kind, length) in enumerate(config.layers):
            name = f"run_{index}"
            run = Run(config, kind, length, name=name)
            x_BLD, caches[name] = run(x_BLD, positions_BL, mask, cache and cache[name])
        if only is not None:
            x_BLD = jnp.take_along_axis(x_BLD, only[:, None, None], axis=1)
        x_BLD = nn.RMSNorm(dtype=config.dtype, name="final_norm")(x_BLD)
        # Small initial logits: a fresh model predicts nearly uniformly.
        head = nn.Dense(
            config.vocab_size,
            use_bias=False,
            dtype=config.dtype,
            kernel_init=nn.initializers.normal(0.02),
            name="head",
        )
        # Tokens in one axis: with two, XLA on CPU takes twice as long for the gradient.
        logits_TV = head(x_BLD.reshape(-1, config.width)).astype(jnp.float32)
        logits_BLV = logits_TV.reshape(*x_BLD.shape[:-1], config.vocab_size)
        return logits_BLV if cache is None else (logits_BLV, caches)


def empty_cache(config: ModelConfig, batch: int, size: int) -> dict[str, KVCache]:
    """A cache for `batch` rows of at most `size` tokens each, by run of blocks."""
    per_head = (config.heads, config.width // config.heads)
    return {
        f"run_{index}": KVCache.zeros(length, batch, size, *per_head, jnp.dtype(config.dtype))
        for index, (_, length) in enumerate(config.layers)
    }
