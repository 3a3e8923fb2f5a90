"""What the kinds of layers say about their parameters, by the parameters' paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.codes import CODES
from peerjax.layers.spec import FeedForward
from peerjax.optim import is_packed_matrix, pack

# Parameters of any module that weight decay leaves alone: norms, embeddings.
UNDECAYED = ("scale", "bias", "embedding")
Layers = Sequence[tuple[FeedForward, int]]


def packed_storage(layers: Layers, path: Any) -> str | None:
    """The format of the codes of a parameter that is kept packed; `None` for one that is not.

    Args:
        layers: kinds of feed-forward layers, stack by stack.
        path: of the parameter, as JAX gives it.
    """
    spec, name = _of_section(layers, path)
    if spec is None or name not in spec.packable or spec.packed_storage not in CODES:
        return None
    return spec.packed_storage


def packed(layers: Layers, params: Any) -> Any:
    """Params with those in codes that are kept so."""

    def pack_leaf(path: Any, leaf: Any) -> Any:
        storage = packed_storage(layers, path)
        return leaf if storage is None or is_packed_matrix(leaf) else pack(leaf, storage)

    return jax.tree_util.tree_map_with_path(pack_leaf, params, is_leaf=is_packed_matrix)


def decayed(layers: Layers, params: Any) -> Any:
    """A tree of booleans: which parameters weight decay shrinks."""

    def is_decayed(path: Any, leaf: Any) -> bool:
        spec, name = _of_section(layers, path)
        return name not in UNDECAYED and not (spec and name in spec.undecayed)

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _of_section(layers: Layers, path: Any) -> tuple[FeedForward | None, str]:
    """The kind whose module a parameter belongs to itself, and the parameter's name."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if names[0].startswith("run_"):
        spec = layers[int(names[0].removeprefix("run_"))][0]
        if names[-2] == spec.section:
            return spec, names[-1]
    return None, names[-1]
