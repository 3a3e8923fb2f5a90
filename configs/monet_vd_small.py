"""`monet_hd_small.py` with vertical decomposition: also 57.33 MFLOPs a token forward."""

from configs import monet_hd_small


def get_config():
    config = monet_hd_small.get_config()
    config.model.layers = (("monet_vd", 8),)
    return config
