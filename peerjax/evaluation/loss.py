"""The probe of the loss, in nats a token and bits a byte."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peerjax.data.tokenizer import Tokenizer
from peerjax.evaluation.probe import Probe
from peerjax.model import Decoder
from peerjax.objectives.language import next_token_loss


class LossSums(NamedTuple):
    """Sums over text.

    Attributes:
        nats: sum of the loss.
        rest: part of the loss that float32 could not add to `nats` (Kahan's compensation).
        tokens: number of targets.
        num_bytes: number of bytes of the targets.
    """

    nats: Float[Array, ""]
    rest: Float[Array, ""]
    tokens: Int[Array, ""]
    num_bytes: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Loss(Probe):
    """Cross-entropy of the next token: `nats_per_token`, `bits_per_byte`, `tokens`, `bytes`.

    Bits a byte are comparable between tokenizers.

    Attributes:
        token_bytes: number of bytes of the text of each token.
    """

    columns: ClassVar[Mapping[str, tuple[str, str]]] = {
        "nats_per_token": ("nats/token", ".4f"),
        "bits_per_byte": ("bits/byte", ".4f"),
        "tokens": ("tokens", ","),
    }

    token_bytes: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Loss:
        """Returns the probe for text of a tokenizer."""
        return cls(tuple(tokenizer.bytes_per_token().tolist()))

    def zeros(self, model: Decoder) -> LossSums:
        """Returns the sums before any text is read."""
        zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return LossSums(zero, zero, none, none)

    def add(
        self, model: Decoder, sums: LossSums, logits_BLV: Array, kept: Any, batch: dict[str, Array]
    ) -> LossSums:
        """Adds a batch to the sums."""
        losses_BL = next_token_loss(logits_BLV, kept, batch, (), 0)
        weight_BL = jnp.broadcast_to(batch["weight"][:, None], losses_BL.shape)
        nats, rest = _compensated(sums.nats, sums.rest, jnp.sum(losses_BL * weight_BL))
        counted_BL = weight_BL.astype(jnp.int32)
        of_targets_BL = jnp.array(self.token_bytes, jnp.int32)[batch["targets"]]
        return LossSums(
            nats,
            rest,
            sums.tokens + jnp.sum(counted_BL),
            sums.num_bytes + jnp.sum(counted_BL * of_targets_BL),
        )

    def result(self, model: Decoder, sums: LossSums, variables: Any) -> dict[str, float]:
        """Returns means over the text, and the numbers of tokens and bytes."""
        nats, rest, tokens, num_bytes = (each.item() for each in sums)
        nats += rest
        return {
            "nats_per_token": nats / tokens,
            "bits_per_byte": nats / (num_bytes * math.log(2)),
            "tokens": tokens,
            "bytes": num_bytes,
        }

    def figures(self, name: str, text: str, result: Mapping[str, Any]) -> dict[str, float]:
        """Returns both means, as `validation/<text>/...`."""
        return {
            f"validation/{text}/{measure}": result[measure]
            for measure in ("nats_per_token", "bits_per_byte")
        }


def _compensated(total: Array, rest: Array, value: Array) -> tuple[Array, Array]:
    """Adds a value to a sum in two parts (Neumaier's variant of Kahan's summation)."""
    new = total + value
    larger = jnp.abs(total) >= jnp.abs(value)
    lost = jnp.where(larger, (total - new) + value, (value - new) + total)
    return new, rest + lost
