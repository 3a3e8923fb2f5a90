"""Storage and weight decay of parameters, found from their paths and the kinds of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.codes import CODES
from peerjax.layers.spec import FeedForward
from peerjax.optim import is_packed_matrix, pack
from peerjax.stacks import stack_index

# Names of parameters without weight decay in any module: norms, biases, embeddings, sink logits and
# thresholds.
UNDECAYED = ("scale", "bias", "embedding", "sink", "threshold")
Layers = Sequence[tuple[FeedForward, int]]


def packed_storage(layers: Layers, path: Any) -> str | None:
    """Returns the format of the codes of a packed parameter, or `None` if it is not packed.

    Args:
        layers: kinds of feed-forward layers, stack by stack.
        path: path of the parameter in JAX's form.
    """
    spec, name = _of_section(layers, path)
    if spec is None or name not in spec.packable or spec.packed_storage not in CODES:
        return None
    return spec.packed_storage


def packed(layers: Layers, params: Any) -> Any:
    """Returns params in which the parameters that are stored as codes are packed."""

    def pack_leaf(path: Any, leaf: Any) -> Any:
        storage = packed_storage(layers, path)
        return leaf if storage is None or is_packed_matrix(leaf) else pack(leaf, storage)

    return jax.tree_util.tree_map_with_path(pack_leaf, params, is_leaf=is_packed_matrix)


def decayed(layers: Layers, params: Any) -> Any:
    """Returns a tree of booleans that are true for parameters with weight decay."""

    def is_decayed(path: Any, leaf: Any) -> bool:
        spec, name = _of_section(layers, path)
        return name not in UNDECAYED and not (spec and name in spec.undecayed)

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _of_section(layers: Layers, path: Any) -> tuple[FeedForward | None, str]:
    """Returns the kind whose module directly owns a parameter, if any, and the parameter's name."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if (stack := stack_index(names[0])) is not None:
        spec = layers[stack][0]
        if names[-2] == spec.section:
            return spec, names[-1]
    return None, names[-1]
