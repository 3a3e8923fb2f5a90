"""`peer_small.py` with a shared path: one dense layer of 128 neurons beside both PEER layers."""

from configs import peer_small


def get_config():
    config = peer_small.get_config()
    config.model.shared_mlp = 128
    return config
