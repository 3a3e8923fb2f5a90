"""Sixty billion expert parameters on a GPU of 80 GB: twelve layers of 1600^2 experts, D = 1024.

Set `XLA_PYTHON_CLIENT_MEM_FRACTION=0.95`. Otherwise JAX leaves a quarter of the memory unused.
"""

from peerjax.config import default_config


def get_config():
    config = default_config()
    config.steps = 1000
    config.data.sequence_length = 512
    config.data.batch_size = 4
    config.model.width = 1024
    config.model.layers = (("peer", 12),)
    config.model.heads = 16
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.peer.num_experts = (1600, 1600)
    config.peer.heads = 8
    config.peer.experts_per_head = 16
    config.peer.key_width = 128
    config.optimizer.learning_rate = 1e-3
    # Each takes 64 GB. While one is written, there are three on disk.
    config.checkpoint.every = config.steps
    config.checkpoint.keep = 2
    return config
