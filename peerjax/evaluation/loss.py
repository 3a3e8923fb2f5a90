"""The probe of the loss, in nats a token and bits a byte."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from peerjax.data.tokenizer import Tokenizer
from peerjax.evaluation.probe import Probe
from peerjax.model import Decoder
from peerjax.objectives.language import next_token_loss


class Sum(NamedTuple):
    """A sum in float32 with the part that float32 could not add (Neumaier's summation).

    Sums of integers below 2^24 are exact far beyond the range of int32.
    """

    value: Float[Array, ""]
    rest: Float[Array, ""]

    @staticmethod
    def zero() -> Sum:
        """Returns the empty sum."""
        return Sum(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def plus(self, value: Float[Array, ""]) -> Sum:
        """Adds a value."""
        total = self.value + value
        larger = jnp.abs(self.value) >= jnp.abs(value)
        lost = jnp.where(larger, (self.value - total) + value, (value - total) + self.value)
        return Sum(total, self.rest + lost)

    def on_host(self) -> float:
        """Returns the sum in float64."""
        return self.value.item() + self.rest.item()


class LossSums(NamedTuple):
    """Sums over text.

    Attributes:
        nats: loss.
        tokens: number of targets.
        num_bytes: bytes of the targets.
    """

    nats: Sum
    tokens: Sum
    num_bytes: Sum


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
        """Returns sums of zero."""
        return LossSums(*[Sum.zero() for _ in LossSums._fields])

    def add(
        self, model: Decoder, sums: LossSums, logits_BLV: Array, kept: Any, batch: dict[str, Array]
    ) -> LossSums:
        """Adds a batch to the sums."""
        losses_BL = next_token_loss(logits_BLV, kept, batch, (), 0)
        weight_BL = jnp.broadcast_to(batch["weight"][:, None], losses_BL.shape)
        bytes_BL = jnp.array(self.token_bytes, jnp.float32)[batch["targets"]]
        values = (losses_BL * weight_BL, weight_BL, bytes_BL * weight_BL)
        return LossSums(
            *[own.plus(jnp.sum(value)) for own, value in zip(sums, values, strict=True)]
        )

    def result(self, model: Decoder, sums: LossSums, variables: Any) -> dict[str, float]:
        """Returns means over the text, and its size."""
        nats, tokens, num_bytes = (each.on_host() for each in sums)
        return {
            "nats_per_token": nats / tokens,
            "bits_per_byte": nats / (num_bytes * math.log(2)),
            "tokens": int(tokens),
            "bytes": int(num_bytes),
        }

    def figures(self, name: str, text: str, result: Mapping[str, Any]) -> dict[str, float]:
        """Returns both means, as `validation/<text>/...`."""
        return {
            f"validation/{text}/{measure}": result[measure]
            for measure in ("nats_per_token", "bits_per_byte")
        }
