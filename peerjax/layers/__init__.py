"""Layers of the decoder, and the registry of feed-forward kinds."""

from peerjax.layers.dense import DenseConfig
from peerjax.layers.metapeer import MetaPeerConfig
from peerjax.layers.moe import MoeConfig
from peerjax.layers.monet import MonetHDConfig, MonetVDConfig
from peerjax.layers.peer import PeerConfig
from peerjax.layers.spec import FeedForward

# The kinds that `model.layers` of a configuration may name. To add one, add a line.
FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "dense": DenseConfig,
    "peer": PeerConfig,
    "metapeer": MetaPeerConfig,
    "moe": MoeConfig,
    "monet_hd": MonetHDConfig,
    "monet_vd": MonetVDConfig,
}
