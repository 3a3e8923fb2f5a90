"""`peer_jumprelu_small.py` with thresholds that follow the number of active experts."""

from configs import peer_jumprelu_small


def get_config():
    config = peer_jumprelu_small.get_config()
    config.peer.gate = "threshold"
    return config
