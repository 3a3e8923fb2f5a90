"""`peer_small.py` without experts: eight dense layers, 57.16 MFLOPs a token forward, as its 57.16.

Both by `peerjax.planning.flops`.
"""

from configs import peer_small


def get_config():
    config = peer_small.get_config()
    config.model.layers = (("dense", 8),)
    config.mlp.hidden = 1952
    return config
