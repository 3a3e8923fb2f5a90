"""Placement of arrays on a mesh of devices."""

from peerjax.sharding.rules import BATCH, make_mesh, sharding_of, state_shardings

__all__ = ["BATCH", "make_mesh", "sharding_of", "state_shardings"]
