"""Models and parts of them as files for other tools, and back; nothing is ever pickled.

Here: pools, packed matrices and other arrays. `peerjax.exchange.monet`: whole models of Monet, in
the layout of the published checkpoints.
"""

from peerjax.exchange.packed import load, restore, save, save_floats

__all__ = ["load", "restore", "save", "save_floats"]
