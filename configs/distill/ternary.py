"""`int4.py` with pools of ternary."""

from configs.distill import int4


def get_config():
    config = int4.get_config()
    config.pool.storage = "ternary"
    return config
