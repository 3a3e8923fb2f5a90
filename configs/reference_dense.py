"""`reference.py` without experts: four dense layers.

A token takes 3.18 MFLOPs forward, as in `reference.py`, by `peerjax.flops`.
"""

from configs import reference


def get_config():
    config = reference.get_config()
    config.model.layers = (("dense", 4),)
    config.mlp.hidden = 656
    return config
