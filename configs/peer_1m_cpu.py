"""A million experts on a laptop: the layer of `peer_1m.py` packed in int4, one byte a parameter."""

from configs import peer_1m


def get_config():
    config = peer_1m.get_config()
    config.steps = 20
    config.pool.storage = "int4"
    config.pool.rule = "rowwise"
    config.pool.learning_rate = 1e-2
    return config
