"""Pools, packed matrices and other arrays as safetensors files, for other tools and back.

`save` keeps what is packed packed: `NAME.codes` and `NAME.scales`, and how they lie in the file's
metadata. `save_floats` writes plain weights, which any tool reads.
"""

import dataclasses
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from jaxtyping import Array

from pallas_kernels.storage import ExpertPool, read_floats
from peerjax.errors import UserError
from peerjax.exchange.files import named_leaves, write_tensors
from peerjax.optim import PackedMatrix

METADATA = "peerjax"
# In the file, for whoever reads it without peerjax.
LAYOUT = (
    "int32 words; code c of a vector of D codes of b bits, two's complement, is in word c mod W, "
    "W = D b / 32, from bit b (c div W) upwards. Pool: [layers, units, 128], experts one after the "
    "other, `down` then `up`, W words each; weight = code * scale, scales [layers, 2, N]. Matrix: "
    "[rows, W], its width padded to whole words; scales [rows]."
)


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a tree of pools, packed matrices and arrays, bit by bit as they are.

    Names are the paths of the leaves, joined by dots. The file appears when it is whole.

    Raises:
        UserError: if two leaves have the same name.
    """
    tensors: dict[str, Array] = {}
    kinds: dict[str, dict[str, Any]] = {}
    for name, leaf in named_leaves(tree, _is_leaf).items():
        if isinstance(leaf, ExpertPool) and leaf.is_packed:
            kinds[name] = {"kind": "pool", **_static_fields(leaf)}
            tensors |= {f"{name}.codes": leaf.weights, f"{name}.scales": leaf.scales}
        elif isinstance(leaf, ExpertPool):
            kinds[name] = {"kind": "pool", **_static_fields(leaf)}
            tensors[f"{name}.weights"] = leaf.weights
        elif isinstance(leaf, PackedMatrix):
            kinds[name] = {"kind": "matrix", **_static_fields(leaf)}
            tensors |= {f"{name}.codes": leaf.words, f"{name}.scales": leaf.scales}
        else:
            tensors[name] = jnp.asarray(leaf)
    metadata = {METADATA: json.dumps(kinds), "layout": LAYOUT}
    write_tensors(path, tensors, metadata)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save` wrote: pools, packed matrices and arrays by name.

    Files of other tools are read too, as arrays.

    Raises:
        UserError: if the file is missing, damaged, or lacks a tensor that its metadata names.
    """
    try:
        with safetensors.safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kinds = json.loads(metadata.get(METADATA, "{}"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {os.fspath(path)} as safetensors: {error}") from None

    def take(name: str) -> Array:
        if name not in tensors:
            raise UserError(f"{os.fspath(path)} has no tensor {name!r}, which its metadata names")
        return tensors.pop(name)

    packed: dict[str, Any] = {}
    for name, fields in kinds.items():
        kind = fields.pop("kind")
        if kind == "matrix":
            packed[name] = PackedMatrix(take(f"{name}.codes"), take(f"{name}.scales"), **fields)
        elif fields["storage"].startswith("int"):
            packed[name] = ExpertPool(take(f"{name}.codes"), take(f"{name}.scales"), **fields)
        else:
            packed[name] = ExpertPool(take(f"{name}.weights"), **fields)
    return packed | tensors


def restore(path: str | os.PathLike[str], like: Any) -> Any:
    """Reads a file into the structure of a tree, whose leaves say what is expected.

    Raises:
        UserError: as `load`; or if a leaf is missing, left over, or of another kind, shape or type.
    """
    found, expected = load(path), named_leaves(like, _is_leaf)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            where = os.fspath(path) if name not in found else "the tree"
            raise UserError(f"{where} has no {name!r}")
        form, own = _form(found[name]), _form(expected[name])
        if form != own:
            raise UserError(f"{name!r} is {form} in {os.fspath(path)}, but {own} in the tree")
    structure = jax.tree.structure(like, is_leaf=_is_leaf)
    return jax.tree.unflatten(structure, [found[name] for name in expected])


def save_floats(
    path: str | os.PathLike[str], tree: Any, dtype: Any = jnp.float32, experts_at_once: int = 65_536
) -> None:
    """Writes a tree with everything that is packed as plain weights of a float type.

    A pool becomes `NAME` [layers, N, 2, D], `down` before `up`, dequantized a part at a time.
    """

    def as_floats(leaf: Any) -> Any:
        if isinstance(leaf, PackedMatrix):
            return leaf.floats().astype(dtype)
        if not isinstance(leaf, ExpertPool):
            return leaf
        layers = leaf.weights.shape[0] if leaf.is_stack else 1
        parts = []
        for layer in range(layers):
            pool = leaf.at_layer(jnp.int32(layer)) if leaf.is_stack else leaf
            for begin in range(0, leaf.num_experts, experts_at_once):
                end = min(begin + experts_at_once, leaf.num_experts)
                parts.append(np.asarray(read_floats(pool, jnp.arange(begin, end)).astype(dtype)))
        weights = np.concatenate(parts).reshape(layers, leaf.num_experts, 2, leaf.width)
        return weights if leaf.is_stack else weights[0]

    tensors = {
        name: jnp.asarray(as_floats(leaf)) for name, leaf in named_leaves(tree, _is_leaf).items()
    }
    write_tensors(path, tensors, {})


def _is_leaf(node: Any) -> bool:
    return isinstance(node, ExpertPool | PackedMatrix)


def _static_fields(leaf: ExpertPool | PackedMatrix) -> dict[str, Any]:
    return {
        field.name: getattr(leaf, field.name)
        for field in dataclasses.fields(leaf)
        if field.metadata.get("static")
    }


def _form(leaf: Any) -> str:
    """What a leaf is, for comparison and for people."""
    arrays = " and ".join(f"{each.dtype}{list(each.shape)}" for each in jax.tree.leaves(leaf))
    if not _is_leaf(leaf):
        return arrays
    fields = ", ".join(f"{name}={value!r}" for name, value in _static_fields(leaf).items())
    return f"a {type(leaf).__name__} of {fields} ({arrays})"
