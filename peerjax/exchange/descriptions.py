"""Describes the pools and packed matrices of a file in its metadata."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, get_type_hints

import jax
import numpy as np

from pallas_kernels import storage
from pallas_kernels.storage import ExpertPool
from peerjax.errors import UserError
from peerjax.optim import PackedMatrix, packed_matrix

KINDS: dict[str, tuple[Any, Callable[..., dict[str, jax.ShapeDtypeStruct]]]] = {
    "matrix": (PackedMatrix, packed_matrix.array_forms),
    "pool": (ExpertPool, storage.array_forms),
}
DESCRIPTIONS, VERSION = "peerjax", "layout_version"
UNSAID = "1"  # the version of files without a version number
# Written to the file for readers without peerjax.
LAYOUT = f"{storage.LAYOUT} {packed_matrix.LAYOUT}"


def is_described(node: Any) -> bool:
    """Whether a node of a tree is a pool or a packed matrix, not a plain array."""
    return isinstance(node, ExpertPool | PackedMatrix)


def describe(leaf: ExpertPool | PackedMatrix) -> dict[str, Any]:
    """Returns the kind of a leaf and its static fields."""
    kind = next(kind for kind, (make, _) in KINDS.items() if isinstance(leaf, make))
    return {"kind": kind} | {name: getattr(leaf, name) for name in _field_types(type(leaf))}


def make_leaf(description: dict[str, Any], arrays: dict[str, Any]) -> Any:
    """Makes a leaf from its description and its arrays by attribute: the inverse of `describe`."""
    fields = {name: value for name, value in description.items() if name != "kind"}
    return KINDS[description["kind"]][0](**arrays, **fields)


def write_descriptions(descriptions: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Returns the metadata of a file with these leaves."""
    return {
        DESCRIPTIONS: json.dumps(descriptions),
        VERSION: storage.LAYOUT_VERSION,
        "layout": LAYOUT,
    }


def read_descriptions(metadata: dict[str, str], where: str) -> dict[str, Any]:
    """Returns the descriptions of leaves in metadata, by name. `array_forms` checks each of them.

    Raises:
        UserError: if the metadata has another layout version, or is not a JSON object.
    """
    if DESCRIPTIONS not in metadata:
        return {}
    version, own = metadata.get(VERSION, UNSAID), storage.LAYOUT_VERSION
    if version != own:
        raise UserError(
            f"{where} has layout version {version}, and this peerjax reads version {own}; "
            "read it with the peerjax that wrote it"
        )
    try:
        descriptions = json.loads(metadata[DESCRIPTIONS])
    except (ValueError, RecursionError):
        descriptions = None
    if not isinstance(descriptions, dict):
        raise UserError(
            f"{where} has metadata {DESCRIPTIONS!r} that is no JSON object; write the file again"
        )
    return {name: _renamed(description) for name, description in descriptions.items()}


def _renamed(description: Any) -> Any:
    """Returns a description with the field names of this version."""
    if not isinstance(description, dict) or "bits" not in description:
        return description
    fields = {name: value for name, value in description.items() if name != "bits"}
    return {**fields, "storage": f"int{description['bits']}"}


def array_forms(description: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and types of a described leaf's arrays, by attribute.

    Leading axes of layers or rows are left out.

    Raises:
        ValueError: if no leaf can have this description.
    """
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind not in list(KINDS):
        raise ValueError(f"it should be described as a {' or '.join(KINDS)}")
    make, forms = KINDS[kind]
    types = _field_types(make)
    fields = {name: value for name, value in description.items() if name != "kind"}
    if fields.keys() != types.keys():
        raise ValueError(f"a {kind} has the fields {list(types)}, not {list(fields)}")
    for name, value in fields.items():
        if type(value) is not types[name]:
            raise ValueError(f"{name}={value!r} is not of type {types[name].__name__}")
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name}={value} is not positive")
    return forms(**fields)


def tensor_names(name: str, forms: dict[str, jax.ShapeDtypeStruct]) -> dict[str, str]:
    """Returns the names of a leaf's arrays in the file, by attribute."""
    main = "codes" if "scales" in forms else "weights"
    return {each: f"{name}.{each if each == 'scales' else main}" for each in forms}


def check_arrays(name: str, forms: dict[str, jax.ShapeDtypeStruct], arrays: dict[str, Any]) -> None:
    """Compares the arrays of a leaf with its `array_forms`. Their leading axes must be equal.

    Raises:
        ValueError: if a type or a shape differs.
    """
    attribute, form = next(iter(forms.items()))
    shape = np.shape(arrays[attribute])
    leading = shape[: max(len(shape) - len(form.shape), 0)]
    for attribute, form in forms.items():
        found = form_of(arrays[attribute])
        expected = form_of(jax.ShapeDtypeStruct((*leading, *form.shape), form.dtype))
        if found != expected:
            tensor = tensor_names(name, forms)[attribute]
            raise ValueError(f"{tensor!r} is {found}, where {expected} belongs")


def form_of(array: Any) -> str:
    """Returns type and shape of an array, or of the array that a value would become."""
    return f"{dtype_of(array).name}{list(np.shape(array))}"


def dtype_of(array: Any) -> Any:
    """Returns the dtype of an array, abstract array or random key; otherwise NumPy's choice."""
    dtype = getattr(array, "dtype", None)
    return dtype if hasattr(dtype, "name") else np.asarray(array).dtype


def _field_types(make: type) -> dict[str, type]:
    hints = get_type_hints(make)
    fields = dataclasses.fields(make)
    return {each.name: hints[each.name] for each in fields if each.metadata.get("static")}
