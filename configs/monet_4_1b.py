"""Monet's 4.1B model: 4,173,401,088 parameters with a vocabulary of 32,000.

All other fields are those of `monet_850m.py`.
"""

from configs import monet_850m


def get_config():
    config = monet_850m.get_config()
    config.model.width = 3072
    config.model.layers = (("monet_hd", 32),)
    config.model.heads = 24
    config.monet.expert_width = 24
    config.monet.heads = 12
    return config
