"""Writes pools, packed matrices and other arrays to safetensors files, and reads them.

`save` writes packed leaves as `NAME.codes` and `NAME.scales`, and describes their layout in the
file's metadata. `save_floats` writes plain weights, which any tool reads.
"""

import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from pallas_kernels.storage import ExpertPool, read_floats
from peerjax.errors import UserError
from peerjax.exchange.descriptions import (
    array_forms,
    check_arrays,
    describe,
    dtype_of,
    form_of,
    is_described,
    make_leaf,
    read_descriptions,
    tensor_names,
    write_descriptions,
)
from peerjax.exchange.files import TYPES, Parts, named_leaves, write_tensors
from peerjax.optim import PackedMatrix


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a tree of pools, packed matrices and arrays, with all bits unchanged.

    Names are the paths of the leaves, joined by dots. Python numbers are written as the 64-bit
    arrays that NumPy makes of them. Arrays on several devices are written part by part, so that no
    host has a whole pool. The file appears when it is complete.

    Raises:
        UserError: if two leaves or their tensors have the same name, a leaf could not be read
            back, or the file cannot be written.
    """
    tensors: dict[str, Any] = {}
    owners: dict[str, str] = {}
    descriptions: dict[str, dict[str, Any]] = {}
    for name, leaf in named_leaves(tree, is_described).items():
        parts = {name: leaf}
        if is_described(leaf):
            descriptions[name] = describe(leaf)
            parts = _parts(name, leaf, descriptions[name])
        for tensor, array in parts.items():
            if tensor in tensors:
                raise UserError(
                    f"{owners[tensor]!r} and {name!r} of the tree would both be tensor {tensor!r} "
                    "of the file; rename one of them"
                )
            owners[tensor] = name
            tensors[tensor] = _checked(tensor, array)
    write_tensors(path, tensors, write_descriptions(descriptions))


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the pools, packed matrices and arrays that `save` wrote, by name.

    Files of other tools are read as arrays. Arrays are JAX arrays, except for types that JAX would
    cut to 32 bits. Without `jax_enable_x64`, 64-bit arrays are NumPy arrays.

    Raises:
        UserError: if the file is missing or damaged, has another layout or a tensor of a type that
            NumPy does not have, or does not hold what its metadata describes.
    """
    where = os.fspath(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: _read(file, name) for name in file.keys()}  # noqa: SIM118
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {where} as safetensors: {error}") from None
    packed: dict[str, Any] = {}
    for name, description in read_descriptions(metadata, where).items():
        try:
            forms = array_forms(description)
            names = tensor_names(name, forms)
            missing = [each for each in names.values() if each not in tensors]
            if missing:
                raise UserError(f"{where} has no tensor {missing[0]!r}, which its metadata names")
            arrays = {attribute: tensors.pop(each) for attribute, each in names.items()}
            check_arrays(name, forms, arrays)
        except ValueError as error:
            raise UserError(f"cannot read {name!r} of {where}: {error}; save it again") from None
        packed[name] = make_leaf(description, {key: _as_jax(each) for key, each in arrays.items()})
    for name in packed.keys() & tensors.keys():
        raise UserError(f"{where} has {name!r} twice, packed and as a tensor; save it again")
    return packed | {name: _as_jax(array) for name, array in tensors.items()}


def restore(path: str | os.PathLike[str], like: Any) -> Any:
    """Reads a file into the structure of a tree, and checks its leaves against those of the tree.

    64-bit leaves are NumPy arrays, as in `load`, and so are Python numbers.

    Raises:
        UserError: if `load` fails, or if a leaf is missing, left over, or of another kind, shape
            or type.
    """
    found, expected = load(path), named_leaves(like, is_described)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            where = os.fspath(path) if name not in found else "the tree"
            raise UserError(f"{where} has no {name!r}")
        form, own = _form(found[name]), _form(expected[name])
        if form != own:
            raise UserError(f"{name!r} is {form} in {os.fspath(path)}, but {own} in the tree")
    structure = jax.tree.structure(like, is_leaf=is_described)
    return jax.tree.unflatten(structure, [found[name] for name in expected])


def save_floats(
    path: str | os.PathLike[str], tree: Any, dtype: Any = jnp.float32, experts_at_once: int = 65_536
) -> None:
    """Writes a tree, with packed leaves as plain weights of a float type.

    A pool becomes `NAME` [layers, N, 2, D], with `down` before `up`. It is dequantized in parts.
    Other leaves are written as `save` writes them.

    Raises:
        UserError: in the same cases as `save`.
    """

    def as_floats(name: str, leaf: Any) -> Any:
        if isinstance(leaf, PackedMatrix):
            return np.asarray(leaf.floats()).astype(dtype)
        if not isinstance(leaf, ExpertPool):
            return _checked(name, leaf)
        layers = leaf.weights.shape[:1] if leaf.is_stack else ()
        shape = (*layers, leaf.num_experts, 2, leaf.width)

        def parts() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
            for number in np.ndindex(*layers):
                pool = leaf.at_layer(jnp.int32(number[0])) if leaf.is_stack else leaf
                for begin in range(0, leaf.num_experts, experts_at_once):
                    end = min(begin + experts_at_once, leaf.num_experts)
                    floats = np.asarray(read_floats(pool, jnp.arange(begin, end))).astype(dtype)
                    yield (*number, begin, 0, 0), floats.reshape(*[1] * len(number), *floats.shape)

        return Parts(shape, np.dtype(dtype), parts)

    tensors = {
        name: as_floats(name, leaf) for name, leaf in named_leaves(tree, is_described).items()
    }
    write_tensors(path, tensors, {})


def _parts(name: str, leaf: Any, description: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays of a leaf by tensor name. Stops with an error where `load` would."""
    try:
        forms = array_forms(description)
        arrays = {attribute: getattr(leaf, attribute) for attribute in forms}
        check_arrays(name, forms, arrays)
    except ValueError as error:
        raise UserError(f"cannot save {name!r}: {error}") from None
    return {tensor: arrays[attribute] for attribute, tensor in tensor_names(name, forms).items()}


def _checked(name: str, leaf: Any) -> Any:
    """Returns an array that can be written. JAX is not used, because it cuts 64 bits to 32."""
    dtype = dtype_of(leaf)
    if dtype.name not in TYPES:
        raise UserError(
            f"{name!r} is of type {dtype.name}, which cannot be read back from safetensors; "
            "convert it, or leave it out"
        )
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _as_jax(array: np.ndarray) -> Any:
    """Converts an array to a JAX array, unless JAX would cut its type."""
    kept = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jnp.asarray(array) if kept else array


def _read(file: Any, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except AttributeError:  # the library looks up the type in NumPy
        dtype = file.get_slice(name).get_dtype()
        raise TypeError(f"{name!r} is of type {dtype}, which NumPy does not have") from None


def _form(leaf: Any) -> str:
    """Describes a leaf, for comparisons and for error messages."""
    arrays = " and ".join(form_of(each) for each in jax.tree.leaves(leaf))
    if not is_described(leaf):
        return arrays
    fields = ", ".join(
        f"{name}={value!r}" for name, value in describe(leaf).items() if name != "kind"
    )
    return f"a {type(leaf).__name__} of {fields} ({arrays})"
