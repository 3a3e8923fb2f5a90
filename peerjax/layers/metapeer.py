"""MetaPEER: a metarouter chooses metaexperts, each of which is a PEER router with experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peerjax.layers.look_up import LookUp
from peerjax.layers.peer import POOL, PeerConfig
from peerjax.layers.spec import (
    Context,
    FeedForward,
    Sizes,
    require_choice,
    require_not_negative,
    require_positive,
)
from peerjax.routing.auxiliary import (
    DECODE,
    METAEXPERTS,
    ROUTING,
    removed_experts,
    sow_last,
    sow_loss,
)
from peerjax.routing.choice import Choice, largest
from peerjax.routing.metaexperts import Routers, choose_in_metaexperts
from peerjax.routing.metarouter import (
    choose_by_logits,
    choose_by_means,
    chunk_starts,
    continued_sums,
    means_before,
    opened_counts,
    running_sums,
)
from peerjax.routing.running import FIRST, MOMENTS, STATS, Shares
from peerjax.routing.token_choice import balance_loss_at, counts_of

# Values of `metapeer.choice`.
TOKEN, SEQUENCE = CHOICES = ("token", "sequence")
# Fields of the section "peer" that a metaexpert does not have, with the value that they must have.
NOT_OF_METAEXPERTS = {
    "always_on": 0,
    "group": 1,
    "experts_per_pair": 1,
    "kept_pairs": 0,
    "biases": False,
}


@dataclasses.dataclass(frozen=True)
class MetaPeerConfig(FeedForward):
    """The section "metapeer". The section "peer" describes each metaexpert.

    Attributes:
        metaexperts: M, number of metaexperts. Each has a router of its own and as many experts as
            a PEER layer has.
        chosen: number of metaexperts that a token uses.
        choice: "token": every token chooses its metaexperts. "sequence": a document is cut into
            chunks. The tokens of a chunk use the metaexperts with the largest mean probability over
            all tokens of the document before the chunk. The first chunk uses those with the largest
            mean over earlier training steps.
        chunk: tokens of a chunk.
        switch: whether every chunk chooses anew. Otherwise the choice of a document's second chunk
            lasts to its end.
        open: smallest number of metaexperts that are open to a document in training; 0 for all. The
            number is drawn from `open` to M for each document and step, and the metaexperts with
            the largest mean probability so far are open. Needs the choice "token".
        balance_weight: weight of the loss that spreads tokens over metaexperts; 0 means no loss.
        peer: the section "peer".
    """

    section: ClassVar[str] = "metapeer"
    undecayed: ClassVar[tuple[str, ...]] = ("query_norm_scale", "query_norm_bias")
    further_sections: ClassVar[tuple[str, ...]] = (PeerConfig.section,)

    metaexperts: int = 8
    chosen: int = 2
    choice: str = TOKEN
    chunk: int = 128
    switch: bool = True
    open: int = 0
    balance_weight: float = 1e-2
    peer: PeerConfig = dataclasses.field(default_factory=PeerConfig)

    @classmethod
    def of(cls, sections: Mapping[str, Mapping[str, Any]]) -> MetaPeerConfig:
        """Builds the layer from two sections of a configuration."""
        return cls(**sections[cls.section], peer=PeerConfig(**sections[PeerConfig.section]))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Returns the fields of the section."""
        fields = super().defaults()
        del fields["peer"]
        return fields

    @property
    def pools(self) -> dict[str, int]:
        """One pool, with the experts of all metaexperts."""
        return {POOL: self.metaexperts * self.peer.pools[POOL]}

    @property
    def spread_of_pool(self) -> int:
        """`peer.spread`."""
        return self.peer.spread

    def check(self, width: int) -> None:
        """Raises a ValueError if a field is out of range or metaexperts cannot have it."""
        require_positive(self, "metaexperts", "chosen", "chunk")
        require_not_negative(self, "balance_weight", "open")
        require_choice(self, "choice", CHOICES)
        if self.chosen > self.metaexperts:
            raise ValueError(
                f"metapeer.chosen={self.chosen} is more than metapeer.metaexperts="
                f"{self.metaexperts}"
            )
        if self.open and not self.chosen <= self.open <= self.metaexperts:
            raise ValueError(
                f"metapeer.open={self.open} is not in [{self.chosen}, {self.metaexperts}], the "
                "numbers of metaexperts from which metapeer.chosen can be taken; 0 opens all"
            )
        if self.open and self.choice == SEQUENCE:
            raise ValueError(
                f"metapeer.open={self.open} limits what tokens choose from, but with "
                "metapeer.choice='sequence' they do not choose; set it to 0"
            )
        if not self.switch and self.choice == TOKEN:
            raise ValueError(
                "metapeer.switch=False keeps the choice of a chunk, but with metapeer.choice="
                "'token' every token chooses; set it to True"
            )
        if self.peer.gate == "product":
            raise ValueError(
                "peer.gate='product' is the router of Monet, which cannot be a metaexpert; set it "
                "to 'softmax'"
            )
        if self.peer.gate != "softmax":
            raise ValueError(
                f"peer.gate={self.peer.gate!r} does not work in metaexperts; set it to 'softmax'"
            )
        if self.peer.query_norm not in ("layernorm", "none"):
            raise ValueError(
                f"peer.query_norm={self.peer.query_norm!r} does not work in metaexperts; choose "
                "'layernorm' or 'none'"
            )
        for name, only in NOT_OF_METAEXPERTS.items():
            if (value := getattr(self.peer, name)) != only:
                raise ValueError(
                    f"peer.{name}={value} does not work in metaexperts; set it to {only}"
                )
        self.peer.check(width)

    def check_length(self, length: int) -> None:
        """Raises a ValueError if no sequence has a second chunk."""
        if (self.choice == SEQUENCE or self.open) and self.chunk >= length:
            raise ValueError(
                f"metapeer.chunk={self.chunk} is not less than data.sequence_length={length}, so "
                "no document would have a second chunk"
            )

    def module(self, sizes: Sizes, name: str | None = None) -> MetaPEER:
        """Builds the layer."""
        return MetaPEER(self, sizes, name=name)

    def flops(self, width: int) -> dict[str, float]:
        """Counts the metarouter, and the chosen metaexperts without the padding of blocks."""
        of_metaexpert = self.peer.flops(width)
        return {
            "metarouter": 2 * width * self.metaexperts,
            **{name: self.chosen * count for name, count in of_metaexpert.items()},
        }


class MetaRouter(nn.Module):
    """Chooses metaexperts for every token.

    The probabilities are `softmax(x W)`, in float32. `peerjax.routing.metarouter` defines what is
    made of them. Without chunks, the gates are those of a mixture of MLPs.

    The module reads `shares` of the collection "stats": mean probabilities and shares of choices
    over earlier steps. It sows those of the batch into "moments". It sows its choice into
    "routing" as `metaexperts`. Metaexperts that the collection "removed" marks come last, and
    their gate is 0. In decoding, the module keeps running sums of probabilities by position.
    """

    config: MetaPeerConfig

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context
    ) -> tuple[Int[Array, "T j"], Float[Array, "T j"]]:
        """Returns the chosen metaexperts of every token, best first, and their gates."""
        config, total = self.config, self.config.metaexperts
        init = nn.initializers.normal(0.02)
        dense = nn.Dense(total, use_bias=False, kernel_init=init, name="logits")
        logits_BLM = dense(x_BLD.astype(jnp.float32))
        probabilities_BLM = jax.nn.softmax(logits_BLM, axis=-1)
        shares = self.variable(STATS, "shares", Shares.even, total).value
        is_first = self.is_mutable_collection(FIRST) and not self.is_initializing()
        if is_first:
            mean_M = jnp.mean(probabilities_BLM, axis=(0, 1))
            shares = Shares(mean_M, mean_M)
        removed = removed_experts(self)
        if config.choice == SEQUENCE:
            means_BLM = self._means(probabilities_BLM, context, shares.probability)
            chosen, gates = choose_by_means(means_BLM, config.chosen, removed)
        else:
            is_open = None
            if config.open and context.step is not None:
                means_BLM = self._means(probabilities_BLM, context, shares.probability)
                is_open = largest(means_BLM, self._opened_counts(context))
            chosen, gates = choose_by_logits(logits_BLM, config.chosen, removed, is_open)
        chosen_Tj, gates_Tj = (each.reshape(-1, config.chosen) for each in (chosen, gates))
        probabilities_TM = probabilities_BLM.reshape(-1, total)
        self._sow(probabilities_TM, chosen_Tj, shares, is_first)
        sow_last(self, ROUTING, METAEXPERTS, Choice(chosen_Tj, gates_Tj, total))
        return chosen_Tj, gates_Tj

    def _opened_counts(self, context: Context) -> Int[Array, "B L"]:
        """Returns the number of metaexperts that are open to each token in training."""
        if context.rows is None:
            raise ValueError(
                "metapeer.open draws by the number of each row of text; give the decoder rows_B, "
                "the field `row` of a batch"
            )
        return opened_counts(
            context.seed,
            context.step,
            context.rows,
            context.segments,
            self.config.open,
            self.config.metaexperts,
        )

    def _means(self, probabilities_BLM: Array, context: Context, otherwise_M: Array) -> Array:
        """Returns the mean probabilities over the tokens of a document before each chunk."""
        config, positions_BL = self.config, context.positions
        starts_BL = chunk_starts(positions_BL, config.chunk, config.switch)
        if context.places is None:
            sums = running_sums(probabilities_BLM, positions_BL)
            first_BL = jnp.arange(positions_BL.shape[1]) - positions_BL
            return means_before(sums, first_BL + starts_BL - 1, starts_BL, otherwise_M)
        shape = (len(positions_BL), context.places.size, config.metaexperts)
        state = self.variable(DECODE, "sums", jnp.zeros, shape)
        state.value = continued_sums(state.value, probabilities_BLM, positions_BL)
        return means_before(state.value, starts_BL - 1, starts_BL, otherwise_M)

    def _sow(self, probabilities_TM: Array, chosen: Array, shares: Shares, is_first: bool) -> None:
        weight = self.config.balance_weight
        sow_loss(self, "balance", weight * balance_loss_at(probabilities_TM, shares.chosen))
        of_batch = Shares(
            jnp.mean(jax.lax.stop_gradient(probabilities_TM), axis=0),
            counts_of(chosen, self.config.metaexperts) / chosen.size,
        )
        if is_first:
            sow_last(self, FIRST, "shares", of_batch)
        if self.is_mutable_collection(MOMENTS) and not self.is_initializing():
            sow_last(self, MOMENTS, "shares", of_batch)


class MetaPEER(nn.Module):
    """Computes `sum_m gate_m PEER_m(x)` over the metaexperts that a metarouter chose.

    Expert n of metaexpert m is expert `m N + n` of the one pool of the layer, with spread 1. Only
    the scores of chosen metaexperts are computed. Routing is computed in float32.

    The pool is `context.pools["pool"]`. `LookUp` documents the collections that are read and
    written, and `MetaRouter` those of the metarouter. The collection "stats" also has the norm of
    each sub-key at initialisation.
    """

    config: MetaPeerConfig
    sizes: Sizes

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context, routed: None = None
    ) -> tuple[Float[Array, "B L D"], None]:
        """Applies the layer to every token."""
        peer = self.config.peer
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        chosen_Tj, gates_Tj = MetaRouter(self.config, name="metarouter")(x_BLD, context)
        choice = choose_in_metaexperts(
            x_TD.astype(jnp.float32),
            chosen_Tj,
            gates_Tj,
            self._routers(x_TD.shape[-1]),
            peer.experts_per_head,
            spread=peer.spread,
            implementation=self.sizes.implementation,
        )
        look_up = LookUp(peer.activation, self.sizes.implementation, self.sizes.exchange, name=POOL)
        return look_up(x_TD, choice, context).reshape(x_BLD.shape), routed

    def _routers(self, width: int) -> Routers:
        peer, total = self.config.peer, self.config.metaexperts
        features = peer.heads * 2 * peer.key_width
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        query_MDF = self.param("query", init, (total, width, features))
        norm = None
        if peer.query_norm == "layernorm":
            shape = (total, 2 * peer.key_width)
            norm = (
                self.param("query_norm_scale", nn.initializers.ones, shape),
                self.param("query_norm_bias", nn.initializers.zeros, shape),
            )

        def keys(name: str, count: int) -> Array:
            init = nn.initializers.normal(peer.key_width**-0.5)
            keys_MHNd = self.param(name, init, (total, peer.heads, count, peer.key_width))
            if self.is_initializing():
                self.variable(STATS, f"initial_norm_{name}", jnp.linalg.norm, keys_MHNd, axis=-1)
            return keys_MHNd

        n1, n2 = peer.num_experts
        return Routers(query_MDF, keys("keys1", n1), keys("keys2", n2), norm)
