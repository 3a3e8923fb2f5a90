"""`peer_small.py` without experts: eight dense layers.

A token takes 57.16 MFLOPs forward, as in `peer_small.py`, by `peerjax.flops`.
"""

from configs import peer_small


def get_config():
    config = peer_small.get_config()
    config.model.layers = (("dense", 8),)
    config.mlp.hidden = 1952
    return config
