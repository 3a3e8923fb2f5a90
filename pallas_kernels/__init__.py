"""Operations on pools of very many tiny experts. They take and return arrays only.

Each operation has a folder. Its `api.py` holds the public function. Its `xla.py` always works, and
every other implementation is tested against it. The package contains no model code.
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
