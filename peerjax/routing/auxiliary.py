"""What layers leave beside their output, and which of their experts are taken out.

What they leave are losses of their own, and which experts they chose.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Collections. Each value is the last one sown, stacked over the blocks of a run.
LOSSES, ROUTING = "losses", "routing"
# A collection that is given: experts to leave out, stacked likewise, beside those in "routing".
REMOVED = "removed"
# Every rematerialisation policy must save arrays of this name.
EXPERT_IDS = "expert_ids"


def sow_loss(layer: nn.Module, name: str, loss: Float[Array, ""]) -> None:
    """Adds a term to the loss that training differentiates.

    The terms of all layers are summed. The training figures show each as `losses/<run>/<name>`,
    the mean over the layers of the run; evaluation ignores them.

    Args:
        layer: the layer at hand.
        name: of the term; each name once a layer.
        loss: already weighted.
    """
    sow_last(layer, LOSSES, name, loss)


def keep_routing(layer: nn.Module, ids: Int[Array, "T K"], gates: Float[Array, "T K"]) -> None:
    """Leaves a layer's choice for whoever makes "routing" mutable: one layer of a block."""
    sow_last(layer, ROUTING, "ids", ids)
    sow_last(layer, ROUTING, "gates", gates)


def keep_factored_routing(
    layer: nn.Module, g1: Float[Array, "B L H n"], g2: Float[Array, "B L H n"]
) -> None:
    """Leaves gates of the two sides of a router: expert i n + j has `sum_h g1_hi g2_hj`."""
    sow_last(layer, ROUTING, "g1", g1.reshape(-1, *g1.shape[-2:]))
    sow_last(layer, ROUTING, "g2", g2.reshape(-1, *g2.shape[-2:]))


def removed_experts(layer: nn.Module) -> Bool[Array, " N"] | None:
    """The experts of a layer that are to add nothing to its output, if any are given."""
    if not layer.has_variable(REMOVED, "experts"):
        return None
    return layer.get_variable(REMOVED, "experts")


def without_removed(
    layer: nn.Module, ids: Int[Array, "*S K"], gates: Float[Array, "*S K"]
) -> Float[Array, "*S K"]:
    """Sets the gates of removed experts to 0; the others stay as they are."""
    removed = removed_experts(layer)
    return gates if removed is None else jnp.where(removed[ids], 0, gates)


def sow_last(layer: nn.Module, collection: str, name: str, value: Any) -> None:
    """Leaves a value in a collection, in place of one that is there; once a call."""
    layer.sow(collection, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
