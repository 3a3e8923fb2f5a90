"""Optax transforms for packed pools; imports no model code."""

from peerjax.optim.accumulation import AccumulationState, int4_accumulation
from peerjax.optim.overwrite import Overwrite, apply_updates

__all__ = ["AccumulationState", "Overwrite", "apply_updates", "int4_accumulation"]
