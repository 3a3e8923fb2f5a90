"""Twelve billion expert parameters on one TPU v5e of 16 GB.

Each layer has 704^2 experts. All other fields are those of `peer_60b_one_gpu.py`.
"""

from configs import peer_60b_one_gpu


def get_config():
    config = peer_60b_one_gpu.get_config()
    config.peer.num_experts = (704, 704)
    return config
