"""`int4.py` with pools of int3."""

from configs.distill import int4


def get_config():
    config = int4.get_config()
    config.pool.storage = "int3"
    return config
