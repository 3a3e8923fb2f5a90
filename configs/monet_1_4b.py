"""Monet's 1.4B model: 1,465,157,632 parameters with a vocabulary of 32,000.

All other fields are those of `monet_850m.py`.
"""

from configs import monet_850m


def get_config():
    config = monet_850m.get_config()
    config.model.width = 2048
    config.model.layers = (("monet_hd", 24),)
    config.model.heads = 16
    config.monet.expert_width = 16
    config.monet.heads = 8
    return config
