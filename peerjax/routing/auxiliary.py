"""Values that layers sow beside their output: terms of the loss, and the chosen experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float

if TYPE_CHECKING:
    from peerjax.routing.choice import Choice, FactoredChoice

# Collections that layers sow. Each value is the last one sown, stacked over the blocks of a stack.
LOSSES, ROUTING = "losses", "routing"
# A collection that the caller gives: experts to leave out. Its paths and axes match "routing".
REMOVED = "removed"
# Small state that a layer keeps between tokens in decoding, also stacked over blocks.
DECODE = "decode"
# A collection that distillation makes mutable: outputs of feed-forward layers.
OUTPUTS = "outputs"
# A collection that evaluation makes mutable: figures of attention sinks and large activations.
SINKS = "sinks"
# Names within collections. A kind of layer that sows "metaexperts" has a field `chunk`.
CHOICE, METAEXPERTS, EXPERTS = "choice", "metaexperts", "experts"
# Every rematerialisation policy must save arrays with this name.
EXPERT_IDS = "expert_ids"


def sow_loss(layer: nn.Module, name: str, loss: Float[Array, ""]) -> None:
    """Adds a term to the loss that training differentiates.

    The terms of all layers are summed. Training shows the mean of each term over the layers of a
    stack. Evaluation ignores terms.

    Args:
        layer: the module that adds the term.
        name: name of the term. A module uses each name once.
        loss: a scalar, already multiplied by its weight.

    Raises:
        ValueError: if the term is not a scalar.
    """
    if jnp.shape(loss):
        raise ValueError(
            f"the loss term {name!r} has shape {jnp.shape(loss)}, but a term is a scalar; take its "
            "mean or its sum"
        )
    sow_last(layer, LOSSES, name, loss)


def keep_choice(layer: nn.Module, choice: Choice | FactoredChoice) -> None:
    """Sows a layer's choice, for callers that make "routing" mutable. Call it once per module."""
    sow_last(layer, ROUTING, CHOICE, choice)


def removed_experts(layer: nn.Module) -> Bool[Array, " N"] | None:
    """Returns the experts that a layer must leave out, or `None` if none are given."""
    if not layer.has_variable(REMOVED, EXPERTS):
        return None
    return layer.get_variable(REMOVED, EXPERTS)


def sow_last(layer: nn.Module, collection: str, name: str, value: Any) -> None:
    """Sows a value in place of the previous one. Use each name once per call of a module."""
    layer.sow(collection, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def by_module(collection: Any) -> dict[tuple[str, ...], dict[str, Any]]:
    """Returns the values of a collection by the module's path and the value's name."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for (*path, name), value in flatten_dict(collection).items():
        found.setdefault(tuple(path), {})[name] = value
    return found
