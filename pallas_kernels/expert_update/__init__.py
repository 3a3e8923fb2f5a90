"""The in-place update of a pool from a factored gradient."""

from pallas_kernels.codes import accumulator_bits_of
from pallas_kernels.expert_update.api import UpdateState, check_state, update
from pallas_kernels.expert_update.rule import Hyperparameters, Statistics

__all__ = [
    "Hyperparameters",
    "Statistics",
    "UpdateState",
    "accumulator_bits_of",
    "check_state",
    "update",
]
