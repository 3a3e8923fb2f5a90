"""`int4.py` with pools of int8."""

from configs.distill import int4


def get_config():
    config = int4.get_config()
    config.pool.storage = "int8"
    return config
