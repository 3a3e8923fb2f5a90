"""Ops on pools of very many tiny experts: arrays in, arrays out, no model code.

One folder per op. Each has `api.py` (the public function) and `xla.py` (always works, and
the reference that every other implementation is tested against).
"""

from pallas_kernels.expert_lookup import lookup
from pallas_kernels.expert_update import Hyperparameters, UpdateState, update
from pallas_kernels.factored_gradient import FactoredGradient, Tap
from pallas_kernels.storage import ExpertPool

__all__ = [
    "ExpertPool",
    "FactoredGradient",
    "Hyperparameters",
    "Tap",
    "UpdateState",
    "lookup",
    "update",
]
