"""Loads recipes of `configs/` and changes their fields."""

import importlib
from typing import Any

import ml_collections


def config_of(recipe: str, **changes: Any) -> ml_collections.ConfigDict:
    """Returns a recipe by name, with other values of fields, such as `{"model.width": 64}`."""
    config = importlib.import_module(f"configs.{recipe}").get_config()
    config.update_from_flattened_dict(changes)
    return config


def with_experts(num_experts: int, **changes: Any) -> ml_collections.ConfigDict:
    """Returns `configs/peer_1m_cpu.py` with another number of experts, which must be a square."""
    root = round(num_experts**0.5)
    return config_of("peer_1m_cpu", **{"peer.num_experts": (root, root), **changes})
