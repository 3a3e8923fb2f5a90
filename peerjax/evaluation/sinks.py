"""The probe of attention sinks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from peerjax.evaluation.probe import ALL, Probe
from peerjax.model import Decoder
from peerjax.routing.auxiliary import SINKS

# A head has a sink in a context if its mean attention to the first token is above this share.
SINK_ABOVE = 0.3


class SinkSums(NamedTuple):
    """Sums over text. A context is the part of a document in a row.

    Attributes:
        alpha: sum of alpha_1 over contexts.
        sinks: number of contexts in which alpha_1 is above `SINK_ABOVE`.
        contexts: number of contexts.
        first_share: sum of the attention to the first token, over all later tokens.
        tokens: number of later tokens.
    """

    alpha: Float[Array, "layers heads"]
    sinks: Float[Array, "layers heads"]
    contexts: Float[Array, ""]
    first_share: Float[Array, "layers heads"]
    tokens: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Sinks(Probe):
    """Attention to the first token of a context, by layer and by head.

    With T = `length`, let `alpha_1 = 1/T sum_{i <= T} A_i1`, where A_i1 is the attention of token i
    to the first token of its context. Contexts of fewer than T tokens are left out. Uniform causal
    attention has `alpha_1 = (1 + 1/2 + ... + 1/T) / T`, which is 0.0741 for T = 64.

    - `sink_rate`: share of contexts with `alpha_1 > 0.3`
    - `alpha_1`: mean over contexts
    - `first_share`: mean attention of all later tokens to the first token of their context

    Figures of a layer are means over its heads.

    Attributes:
        length: T.
        first_token: the token with which contexts begin. `None` takes all contexts, also those that
            begin in the middle of a document.

    References:
        Gu et al., "When Attention Sink Emerges in Language Models: An Empirical View",
        arXiv:2410.10781, section 3.1.
    """

    keeps: ClassVar[tuple[str, ...]] = (SINKS,)
    columns: ClassVar[Mapping[str, tuple[str, str]]] = {
        "sink_rate": ("sink rate", ".1%"),
        "alpha_1": ("alpha_1", ".4f"),
        "first_share": ("later tokens to first", ".4f"),
    }

    length: int = 64
    first_token: int | None = None

    def zeros(self, model: Decoder) -> SinkSums:
        """Returns sums of zero."""
        zero = jnp.zeros(())
        by_head = jnp.zeros((model.config.depth, model.config.attention.heads))
        return SinkSums(by_head, by_head, zero, by_head, zero)

    def add(
        self, model: Decoder, sums: SinkSums, logits_BLV: Array, kept: Any, batch: dict[str, Array]
    ) -> SinkSums:
        """Adds a batch to the sums."""
        shares_NHBL = model.config.in_order(kept[SINKS], "first_share").swapaxes(1, 2)
        positions_BL = batch["positions"]
        context_BL, counts = self._contexts(batch)
        early_NHBL = shares_NHBL * (positions_BL < self.length)
        totals = jnp.zeros((*shares_NHBL.shape[:2], context_BL.size))
        alpha = totals.at[:, :, context_BL].add(early_NHBL) / self.length
        later_BL = (positions_BL > 0) * batch["weight"][:, None]
        return SinkSums(
            alpha=sums.alpha + jnp.sum(alpha, axis=-1, where=counts),
            sinks=sums.sinks + jnp.sum(alpha > SINK_ABOVE, axis=-1, where=counts),
            contexts=sums.contexts + jnp.sum(counts),
            first_share=sums.first_share + jnp.einsum("nhbl,bl->nh", shares_NHBL, later_BL),
            tokens=sums.tokens + jnp.sum(later_BL),
        )

    def _contexts(self, batch: dict[str, Array]) -> tuple[Int[Array, "B L"], Bool[Array, " B*L"]]:
        """Returns the context of each token, and whether each context counts."""
        positions_BL, shape = batch["positions"], batch["positions"].shape
        # The number of a context is the place of its first token.
        context_BL = jnp.arange(positions_BL.size).reshape(shape) - positions_BL
        is_long = jnp.zeros(positions_BL.size, bool)
        is_long = is_long.at[context_BL].max(positions_BL >= self.length - 1)
        counts_BL = is_long.reshape(shape) & (batch["weight"][:, None] > 0)
        if self.first_token is not None:
            counts_BL &= batch["inputs"] == self.first_token
        return context_BL, counts_BL.reshape(-1)

    def result(self, model: Decoder, sums: SinkSums, variables: Any) -> dict[str, Any]:
        """Returns the figures by layer and by head. Without a context, the first two are NaN."""
        sums = jax.device_get(sums)
        contexts = sums.contexts if sums.contexts else np.nan
        by_head = {
            "sink_rate": sums.sinks / contexts,
            "alpha_1": sums.alpha / contexts,
            "first_share": sums.first_share / sums.tokens,
        }
        found = {}
        for layer in range(model.config.depth):
            own = {name: values[layer] for name, values in by_head.items()}
            found[f"layer_{layer}"] = {name: float(each.mean()) for name, each in own.items()}
            for head in range(model.config.attention.heads):
                found[f"layer_{layer}.head_{head}"] = {
                    name: float(each[head]) for name, each in own.items()
                }
        return found

    def figures(self, name: str, text: str, result: Mapping[str, Any]) -> Mapping[str, float]:
        """Returns the figures on all text, as `sinks/all/<layer>/...`."""
        return super().figures(name, text, result) if text == ALL else {}
