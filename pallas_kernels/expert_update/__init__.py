"""The in-place update of a pool from a factored gradient."""

from pallas_kernels.expert_update.api import UpdateState, update
from pallas_kernels.expert_update.rule import Hyperparameters, Statistics

__all__ = ["Hyperparameters", "Statistics", "UpdateState", "update"]
