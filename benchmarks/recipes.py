"""Recipes of `configs/` with fields changed."""

import importlib
from typing import Any

import ml_collections


def config_of(recipe: str, **changes: Any) -> ml_collections.ConfigDict:
    """A recipe by its name, with other values of some fields, such as `{"model.width": 64}`."""
    config = importlib.import_module(f"configs.{recipe}").get_config()
    config.update_from_flattened_dict(changes)
    return config


def with_experts(num_experts: int, **changes: Any) -> ml_collections.ConfigDict:
    """`configs/peer_1m_cpu.py` with another number of experts, a square."""
    root = round(num_experts**0.5)
    return config_of("peer_1m_cpu", **{"peer.num_experts": (root, root), **changes})
