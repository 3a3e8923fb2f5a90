"""Optax transforms for packed pools and matrices; imports no model code."""

from peerjax.optim.accumulation import AccumulationState, int4_accumulation
from peerjax.optim.dense import on_dense_gradients
from peerjax.optim.eco import EcoState, eco
from peerjax.optim.overwrite import Overwrite, apply_updates
from peerjax.optim.packed_matrix import PackedMatrix, dequantize, is_packed_matrix, pack

__all__ = [
    "AccumulationState",
    "EcoState",
    "Overwrite",
    "PackedMatrix",
    "apply_updates",
    "dequantize",
    "eco",
    "int4_accumulation",
    "is_packed_matrix",
    "on_dense_gradients",
    "pack",
]
