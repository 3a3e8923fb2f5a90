"""The interface between the training loop and what it minimises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from peerjax.layers.parameters import packed
from peerjax.model import Decoder
from peerjax.routing.running_norm import STATS

Batch = dict[str, Array]
# (logits_BLV, kept, batch, frozen, step) -> nats_BL
Loss = Callable[[Array, Any, Batch, Any, Array], Array]


class Task(NamedTuple):
    """What a run trains, from which weights, by which loss.

    Attributes:
        model: the decoder.
        init: draws the variables of a fresh run from a random key: the collections "params",
            "pools" and "stats", with those params packed that are kept packed. Called under
            `jax.jit`.
        loss: gives the loss of every token in nats, float32 [B, L]. Its arguments are the logits
            [B, L, V], the collections that `keeps` names, the batch, `frozen`, and the number of
            the step. Training minimises its mean plus the terms that layers add.
        keeps: collections that the loss reads beside those that training keeps for itself.
        rows: wraps a source of rows of text, to add fields to them. The result is indexed as the
            source is, so that a run can be resumed. `None` leaves rows as they are.
        frozen: arrays that the loss reads, such as a teacher's. They are arguments of the compiled
            step; training never saves, moves or donates them.
    """

    model: Decoder
    init: Callable[[Key[Array, ""]], dict[str, Any]]
    loss: Callable[[Array, Any, Batch, Any, Int[Array, ""]], Float[Array, "B L"]]
    keeps: tuple[str, ...] = ()
    rows: Callable[[Any], Any] | None = None
    frozen: Any = ()

    def of_rows(self, source: Any) -> Any:
        """A source of rows with the fields that the task adds."""
        return source if self.rows is None else self.rows(source)


def inputs_of(batch: Batch) -> tuple[Array, Array, Array]:
    """What of a batch the model reads."""
    return batch["inputs"], batch["positions"], batch["segments"]


def drawn_variables(model: Decoder, key: Key[Array, ""]) -> dict[str, Any]:
    """Draws a model's variables; parameters that are kept packed come packed."""
    # Variables do not depend on the batch: the smallest that splits over the devices will do.
    tokens = jnp.zeros((jax.device_count(), 1), jnp.int32)
    variables = model.init(key, tokens, tokens, tokens)
    return {
        "params": packed(model.config.layers, variables["params"]),
        "pools": variables.get("pools", {}),
        STATS: variables.get(STATS, {}),
    }
