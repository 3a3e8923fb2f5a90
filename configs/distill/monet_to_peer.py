"""Distils a model with Monet layers to one with PEER layers and pools of int4.

The student has Monet's routers, and uses 64 experts of each head. `--config.distill.start` can be
"monet_plain", for routers of PEER.
"""

from configs.distill import int4


def get_config():
    config = int4.get_config()
    config.distill.start = "monet"
    config.peer.experts_per_head = 64
    config.peer.kept_pairs = 0  # all pairs of sub-keys keep their experts
    return config
