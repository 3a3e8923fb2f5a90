"""The layer of the PEER paper: 1024^2 experts, 8 heads of 16, in the middle of the decoder.

Its pool has 537 million parameters. With float32 and AdamW they take 8.6 GB, with the gradient.
"""

from peerjax.config import default_config


def get_config():
    config = default_config()
    config.steps = 3
    config.data.batch_size = 2
    config.model.width = 256
    config.model.layers = (("dense", 3), ("peer", 1), ("dense", 2))
    config.mlp.hidden = 1024
    config.peer.num_experts = (1024, 1024)
    config.peer.heads = 8
    config.peer.experts_per_head = 16
    config.peer.key_width = 128
    config.optimizer.learning_rate = 1e-3
    config.pool.storage = "float32"
    config.pool.rule = "adamw"
    config.pool.learning_rate = 1e-3
    config.eval.rows = 2
    return config
