"""`peer_small.py` with a learned threshold a head: 64 active experts a token on average."""

from configs import peer_small


def get_config():
    config = peer_small.get_config()
    config.peer.gate = "jumprelu"
    config.peer.target = 64.0
    config.peer.experts_per_head = 32  # 4 * target / heads
    return config
