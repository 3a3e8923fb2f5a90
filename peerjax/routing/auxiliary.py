"""What layers leave beside their output: terms of the loss, and which experts they chose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float

if TYPE_CHECKING:
    from peerjax.routing.choice import Choice, FactoredChoice

# Collections. Each value is the last one sown, stacked over the blocks of a stack.
LOSSES, ROUTING = "losses", "routing"
# A collection that is given: experts to leave out, stacked likewise, beside those in "routing".
REMOVED = "removed"
# Small state that a layer keeps between tokens while it decodes, stacked over blocks likewise.
DECODE = "decode"
# Names within collections.
CHOICE, EXPERTS = "choice", "experts"
# Every rematerialisation policy must save arrays of this name.
EXPERT_IDS = "expert_ids"


def sow_loss(layer: nn.Module, name: str, loss: Float[Array, ""]) -> None:
    """Adds a term to the loss that training differentiates.

    The terms of all layers are summed. Training shows the mean of each term over the layers of a
    stack; evaluation ignores terms.

    Args:
        layer: the layer at hand.
        name: of the term; each name once a module.
        loss: already weighted.
    """
    sow_last(layer, LOSSES, name, loss)


def keep_choice(layer: nn.Module, choice: Choice | FactoredChoice) -> None:
    """Leaves a layer's choice for a caller that makes "routing" mutable; once a module."""
    sow_last(layer, ROUTING, CHOICE, choice)


def removed_experts(layer: nn.Module) -> Bool[Array, " N"] | None:
    """The experts of a layer that are to add nothing to its output, if any are given."""
    if not layer.has_variable(REMOVED, EXPERTS):
        return None
    return layer.get_variable(REMOVED, EXPERTS)


def sow_last(layer: nn.Module, collection: str, name: str, value: Any) -> None:
    """Leaves a value in a collection, in place of one that is there; once a call."""
    layer.sow(collection, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def by_module(collection: Any) -> dict[tuple[str, ...], dict[str, Any]]:
    """What each module has in a collection, by the module's path and the value's name."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for (*path, name), value in flatten_dict(collection).items():
        found.setdefault(tuple(path), {})[name] = value
    return found
