"""The interface between the training loop and an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from peerjax.layers.parameters import packed
from peerjax.model import Decoder
from peerjax.routing.running import STATS
from peerjax.sharding.over_mesh import size_of_mesh

Batch = dict[str, Array]
# (logits_BLV, kept, batch, frozen, step) -> nats_BL
Loss = Callable[[Array, Any, Batch, Any, Array], Array]


class Task(NamedTuple):
    """The model, the initial weights and the loss of a run.

    Attributes:
        model: the decoder.
        init: function that draws the variables of a fresh run from a random key. They are the
            collections "params", "pools" and "stats". Parameters that are stored packed must be
            packed in "params". The function is called under `jax.jit`.
        loss: function that returns the loss of every token in nats, float32 [B, L]. Its arguments
            are the logits [B, L, V], the collections that `keeps` names, the batch, `frozen`, and
            the number of the step. Training minimises the mean plus the terms that layers add. It
            calls the function with the rows of a microbatch, or with a part of them if `keeps` is
            empty.
        keeps: names of collections that the loss reads. Training always keeps some others.
        rows: function that wraps a source of rows of text to add fields to them. The result must be
            indexed like the source, so that a run can be resumed. `None` adds nothing.
        start: function that returns the variables of a fresh run, in place of `init`, for a run
            that starts from other weights. It is called once, outside of `jax.jit`, with the mesh
            on which to place them. `None` calls `init`.
        frozen: arrays that the loss reads, such as those of a teacher. They are arguments of the
            compiled step. Training never saves, changes or donates them.
    """

    model: Decoder
    init: Callable[[Key[Array, ""]], dict[str, Any]]
    loss: Callable[[Array, Any, Batch, Any, Int[Array, ""]], Float[Array, "B L"]]
    keeps: tuple[str, ...] = ()
    rows: Callable[[Any], Any] | None = None
    start: Callable[[Mesh], dict[str, Any]] | None = None
    frozen: Any = ()

    def of_rows(self, source: Any) -> Any:
        """Returns a source of rows with the fields that the task adds."""
        return source if self.rows is None else self.rows(source)


def inputs_of(batch: Batch) -> tuple[Array, Array, Array]:
    """Returns the arrays of a batch that the model reads."""
    return batch["inputs"], batch["positions"], batch["segments"]


def drawn_variables(model: Decoder, key: Key[Array, ""]) -> dict[str, Any]:
    """Draws a model's variables. Parameters that are stored packed are packed in the result."""
    # Variables do not depend on the batch. This is the smallest one that splits over the devices.
    tokens = jnp.zeros((size_of_mesh(), 1), jnp.int32)
    variables = model.init(key, tokens, tokens, tokens)
    return {
        "params": packed(model.config.layers, variables["params"]),
        "pools": variables.get("pools", {}),
        STATS: variables.get(STATS, {}),
    }
