"""What the metadata of a file says of the pools and packed matrices in it."""

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
UNSAID = "1"  # the version of files that do not say
# In the file, for whoever reads it without peerjax.
LAYOUT = f"{storage.LAYOUT} {packed_matrix.LAYOUT}"


def is_described(node: Any) -> bool:
    """Whether a node of a tree is more than an array."""
    return isinstance(node, ExpertPool | PackedMatrix)


def describe(leaf: ExpertPool | PackedMatrix) -> dict[str, Any]:
    """The kind of a leaf, and its static fields."""
    kind = next(kind for kind, (make, _) in KINDS.items() if isinstance(leaf, make))
    return {"kind": kind} | {name: getattr(leaf, name) for name in _field_types(type(leaf))}


def make_leaf(description: dict[str, Any], arrays: dict[str, Any]) -> Any:
    """The inverse of `describe`, of arrays by attribute."""
    fields = {name: value for name, value in description.items() if name != "kind"}
    return KINDS[description["kind"]][0](**arrays, **fields)


def write_descriptions(descriptions: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The metadata of a file with these leaves."""
    return {
        DESCRIPTIONS: json.dumps(descriptions),
        VERSION: storage.LAYOUT_VERSION,
        "layout": LAYOUT,
    }


def read_descriptions(metadata: dict[str, str], where: str) -> dict[str, Any]:
    """The leaves that metadata names; what it says of each is for `array_forms` to check.

    Raises:
        UserError: if it names none in a way that is known.
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
    """A description with the fields that this version has."""
    if not isinstance(description, dict) or "bits" not in description:
        return description
    fields = {name: value for name, value in description.items() if name != "bits"}
    return {**fields, "storage": f"int{description['bits']}"}


def array_forms(description: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of the leaf described, by attribute, without leading axes of layers or rows.

    Raises:
        ValueError: if there are no such leaves.
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
    """The names that the arrays of a leaf have in the file, by attribute."""
    main = "codes" if "scales" in forms else "weights"
    return {each: f"{name}.{each if each == 'scales' else main}" for each in forms}


def check_arrays(name: str, forms: dict[str, jax.ShapeDtypeStruct], arrays: dict[str, Any]) -> None:
    """Compares the arrays of a leaf with its `array_forms`; leading axes must be the same in all.

    Raises:
        ValueError: if types or shapes are others.
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
    """Type and shape of what is, or is to become, an array."""
    return f"{dtype_of(array).name}{list(np.shape(array))}"


def dtype_of(array: Any) -> Any:
    """As NumPy names it; abstract arrays and random keys, which are none of its, say themselves."""
    dtype = getattr(array, "dtype", None)
    return dtype if hasattr(dtype, "name") else np.asarray(array).dtype


def _field_types(make: type) -> dict[str, type]:
    hints = get_type_hints(make)
    fields = dataclasses.fields(make)
    return {each.name: hints[each.name] for each in fields if each.metadata.get("static")}
