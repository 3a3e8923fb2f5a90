"""Writes models and parts of them to files for other tools, and reads them. Never uses pickle.

The functions of this package are for pools, packed matrices and other arrays.
`peerjax.exchange.monet` is for whole Monet models, in the layout of the published checkpoints.
"""

from peerjax.exchange.packed import load, restore, save, save_floats

__all__ = ["load", "restore", "save", "save_floats"]
