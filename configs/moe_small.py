"""`peer_small.py` with mixtures instead of pools.

Two of the eight layers are mixtures of 64 experts, 2 a token. A token takes 57.16 MFLOPs forward,
as in `peer_small.py`, by `peerjax.flops`.
"""

from configs import peer_small


def get_config():
    config = peer_small.get_config()
    config.model.layers = (("dense", 2), ("moe", 1), ("dense", 2), ("moe", 1), ("dense", 2))
    config.moe.num_experts = 64
    config.moe.experts_per_token = 2
    config.moe.hidden = 816
    return config
