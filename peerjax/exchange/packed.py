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
# What NumPy reads back: safetensors also writes floats of 8 bits, but makes no arrays of them.
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
READABLE = ("bool", *INTEGERS, "bfloat16", "float16", "float32", "float64", "complex64")


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a tree of pools, packed matrices and arrays, bit by bit as they are.

    Names are the paths of the leaves, joined by dots. Numbers of Python are written as the arrays
    that NumPy makes of them, 64 bits wide. The file appears when it is whole.

    Raises:
        UserError: if two leaves or their tensors have the same name, a leaf is of a type that
            cannot be read back, or the file cannot be written.
    """
    tensors: dict[str, Any] = {}
    owners: dict[str, str] = {}
    kinds: dict[str, dict[str, Any]] = {}
    for name, leaf in named_leaves(tree, _is_leaf).items():
        if isinstance(leaf, ExpertPool) and leaf.is_packed:
            kinds[name] = {"kind": "pool", **_static_fields(leaf)}
            parts = {f"{name}.codes": leaf.weights, f"{name}.scales": leaf.scales}
        elif isinstance(leaf, ExpertPool):
            kinds[name] = {"kind": "pool", **_static_fields(leaf)}
            parts = {f"{name}.weights": leaf.weights}
        elif isinstance(leaf, PackedMatrix):
            kinds[name] = {"kind": "matrix", **_static_fields(leaf)}
            parts = {f"{name}.codes": leaf.words, f"{name}.scales": leaf.scales}
        else:
            parts = {name: _as_numpy(name, leaf)}
        for tensor in parts.keys() & owners.keys():
            raise UserError(
                f"{owners[tensor]!r} and {name!r} of the tree would both be tensor {tensor!r} of "
                "the file; rename one of them"
            )
        owners |= dict.fromkeys(parts, name)
        tensors |= parts
    metadata = {METADATA: json.dumps(kinds), "layout": LAYOUT}
    write_tensors(path, tensors, metadata)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save` wrote: pools, packed matrices and arrays by name.

    Files of other tools are read too, as arrays. Arrays are JAX's, except for types that JAX would
    cut to 32 bits: without `jax_enable_x64`, those of 64 bits are NumPy's.

    Raises:
        UserError: if the file is missing, damaged, lacks a tensor that its metadata names, or has
            one of a type that NumPy does not know.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: _read(file, name) for name in file.keys()}  # noqa: SIM118
        kinds = json.loads(metadata.get(METADATA, "{}"))
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {os.fspath(path)} as safetensors: {error}") from None

    def take(name: str) -> Any:
        if name not in tensors:
            raise UserError(f"{os.fspath(path)} has no tensor {name!r}, which its metadata names")
        return _as_jax(tensors.pop(name))

    packed: dict[str, Any] = {}
    for name, fields in kinds.items():
        kind = fields.pop("kind")
        if kind == "matrix":
            packed[name] = PackedMatrix(take(f"{name}.codes"), take(f"{name}.scales"), **fields)
        elif fields["storage"].startswith("int"):
            packed[name] = ExpertPool(take(f"{name}.codes"), take(f"{name}.scales"), **fields)
        else:
            packed[name] = ExpertPool(take(f"{name}.weights"), **fields)
    return packed | {name: _as_jax(array) for name, array in tensors.items()}


def restore(path: str | os.PathLike[str], like: Any) -> Any:
    """Reads a file into the structure of a tree, whose leaves say what is expected.

    Leaves of 64 bits are NumPy arrays, as `load` says, and so are numbers of Python.

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
    Other leaves are written as `save` writes them.

    Raises:
        UserError: as `save`.
    """

    def as_floats(name: str, leaf: Any) -> np.ndarray:
        if isinstance(leaf, PackedMatrix):
            return np.asarray(leaf.floats()).astype(dtype)
        if not isinstance(leaf, ExpertPool):
            return _as_numpy(name, leaf)
        layers = leaf.weights.shape[0] if leaf.is_stack else 1
        parts = []
        for layer in range(layers):
            pool = leaf.at_layer(jnp.int32(layer)) if leaf.is_stack else leaf
            for begin in range(0, leaf.num_experts, experts_at_once):
                end = min(begin + experts_at_once, leaf.num_experts)
                parts.append(np.asarray(read_floats(pool, jnp.arange(begin, end))).astype(dtype))
        weights = np.concatenate(parts).reshape(layers, leaf.num_experts, 2, leaf.width)
        return weights if leaf.is_stack else weights[0]

    tensors = {name: as_floats(name, leaf) for name, leaf in named_leaves(tree, _is_leaf).items()}
    write_tensors(path, tensors, {})


def _is_leaf(node: Any) -> bool:
    return isinstance(node, ExpertPool | PackedMatrix)


def _static_fields(leaf: ExpertPool | PackedMatrix) -> dict[str, Any]:
    return {
        field.name: getattr(leaf, field.name)
        for field in dataclasses.fields(leaf)
        if field.metadata.get("static")
    }


def _as_numpy(name: str, leaf: Any) -> np.ndarray:
    """A leaf that is no pool and no matrix, never by way of JAX, which cuts 64 bits to 32."""
    dtype = _dtype(leaf)
    if dtype.name not in READABLE:
        raise UserError(
            f"{name!r} is of type {dtype.name}, which cannot be read back from safetensors; "
            "convert it, or leave it out"
        )
    return np.asarray(leaf)


def _as_jax(array: np.ndarray) -> Any:
    """The same as a JAX array, if JAX does not cut its type."""
    kept = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jnp.asarray(array) if kept else array


def _read(file: Any, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except AttributeError:  # the library looks for the type in NumPy
        dtype = file.get_slice(name).get_dtype()
        raise TypeError(f"{name!r} is of type {dtype}, which NumPy does not know") from None


def _dtype(leaf: Any) -> Any:
    """The type of what is, or is to become, an array; abstract and random keys too."""
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _form(leaf: Any) -> str:
    """What a leaf is, for comparison and for people."""
    arrays = " and ".join(
        f"{_dtype(each).name}{list(np.shape(each))}" for each in jax.tree.leaves(leaf)
    )
    if not _is_leaf(leaf):
        return arrays
    fields = ", ".join(f"{name}={value!r}" for name, value in _static_fields(leaf).items())
    return f"a {type(leaf).__name__} of {fields} ({arrays})"
