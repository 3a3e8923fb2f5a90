"""Ten trillion expert parameters on a TPU v5p-256, which has 128 chips.

Pools are split over all chips. Each layer has 7,168^2 experts, which are numbered so that every
chip has equally many of each sub-key.
"""

from configs import peer_60b_one_gpu


def get_config():
    config = peer_60b_one_gpu.get_config()
    config.mesh.expert = 128
    config.model.width = 1024
    config.model.layers = (("peer", 96),)
    config.model.heads = 16
    config.model.kv_heads = 4
    config.model.remat = True
    config.peer.num_experts = (7168, 7168)
    config.peer.heads = 8
    config.peer.experts_per_head = 16
    config.peer.key_width = 32
    config.peer.spread = 1024
    # Steps are bounded without it. With it, every gradient would be exchanged twice.
    config.pool.clip_norm = 0.0
    config.data.sequence_length = 2048
    config.data.batch_size = 128
    return config
