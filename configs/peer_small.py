"""A real experiment for one accelerator, or a long run on a CPU.

Two of the eight layers are PEER layers.
"""

from peerjax.config import default_config


def get_config():
    config = default_config()
    config.steps = 10_000
    config.data.sequence_length = 512
    config.data.batch_size = 32
    config.data.workers = 1
    config.model.width = 512
    config.model.layers = (("dense", 2), ("peer", 1), ("dense", 2), ("peer", 1), ("dense", 2))
    config.model.heads = 8
    config.mlp.hidden = 2048
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.peer.num_experts = (256, 256)
    config.peer.heads = 8
    config.peer.experts_per_head = 16
    config.peer.key_width = 128
    config.peer.query_norm = "batchnorm"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 500
    config.eval.every = 1000
    config.eval.rows = 128
    config.checkpoint.every = 500
    return config
