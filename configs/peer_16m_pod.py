"""Twelve layers of 2^24 experts each, on the 8 chips of a TPU v5p-16 or on 8 GPUs of 80 GB."""

from configs import peer_60b_one_gpu


def get_config():
    config = peer_60b_one_gpu.get_config()
    config.mesh.expert = 8
    config.peer.num_experts = (4096, 4096)
    config.peer.spread = 1024
    config.pool.clip_norm = 0.0
    config.data.batch_size = 32
    return config
