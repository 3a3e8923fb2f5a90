"""`monet_hd_small.py` in vertical decomposition: 57.33 MFLOPs a token forward too."""

from configs import monet_hd_small


def get_config():
    config = monet_hd_small.get_config()
    config.model.layers = (("monet_vd", 8),)
    return config
