"""Placement of arrays on a mesh of devices."""

from peerjax.sharding.rules import (
    BATCH,
    make_mesh,
    mesh_for,
    mesh_of_run,
    sharding_of,
    state_shardings,
)

__all__ = ["BATCH", "make_mesh", "mesh_for", "mesh_of_run", "sharding_of", "state_shardings"]
