"""What layers leave beside their output: losses of their own, and which experts they chose."""

import flax.linen as nn
from jaxtyping import Array, Float, Int

# Collections. Each value is the last one sown, stacked over the blocks of a run.
LOSSES, ROUTING = "losses", "routing"


def sow_loss(layer: nn.Module, name: str, loss: Float[Array, ""]) -> None:
    """Adds a term to the loss that training differentiates.

    The terms of all layers are summed. The training figures show each as `losses/<run>/<name>`,
    the mean over the layers of the run; evaluation ignores them.

    Args:
        layer: the layer at hand.
        name: of the term; each name once a layer.
        loss: already weighted.
    """
    _sow(layer, LOSSES, name, loss)


def keep_routing(layer: nn.Module, ids: Int[Array, "T K"], gates: Float[Array, "T K"]) -> None:
    """Leaves a layer's choice for whoever makes "routing" mutable: one layer of a block."""
    _sow(layer, ROUTING, "ids", ids)
    _sow(layer, ROUTING, "gates", gates)


def keep_factored_routing(
    layer: nn.Module, g1: Float[Array, "B L H n"], g2: Float[Array, "B L H n"]
) -> None:
    """Leaves gates of the two sides of a router: expert i n + j has `sum_h g1_hi g2_hj`."""
    _sow(layer, ROUTING, "g1", g1.reshape(-1, *g1.shape[-2:]))
    _sow(layer, ROUTING, "g2", g2.reshape(-1, *g2.shape[-2:]))


def _sow(layer: nn.Module, collection: str, name: str, value: Array) -> None:
    layer.sow(collection, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
