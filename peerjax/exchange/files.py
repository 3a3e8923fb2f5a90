"""Shared code of all formats: names of the leaves of trees, and safetensors files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from peerjax.atomic import replace_whole
from peerjax.errors import UserError

# Types that NumPy reads back, by their names in the header of a file. There are 8-bit floats too.
TYPES = {
    **{"bool": "BOOL", "bfloat16": "BF16", "complex64": "C64"},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, joined by dots.

    Raises:
        UserError: if two leaves have the same name.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    named: dict[str, Any] = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in named:
            raise UserError(f"two leaves of the tree have the name {name!r}")
        named[name] = leaf
    return named


class Parts(NamedTuple):
    """An array that is made part by part while it is written.

    Attributes:
        shape: shape of the array.
        dtype: type of the array.
        parts: function that yields the parts, each with the index of its first number.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parts: Callable[[], Iterator[tuple[tuple[int, ...], np.ndarray]]]

    @staticmethod
    def of(array: Any) -> Parts:
        """Returns the parts of an array: of each device, and of each entry of the first axis.

        A host then never has an array whole that lies on several devices.
        """
        shape = np.shape(array)
        dtype = np.dtype(getattr(array, "dtype", None) or np.asarray(array).dtype)

        def parts() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
            for first, own in _on_devices(array):
                if len(shape) < 2:
                    yield first, np.asarray(own)
                    continue
                for number in range(own.shape[0]):
                    yield (first[0] + number, *first[1:]), np.asarray(own[number])[None]

        return Parts(shape, dtype, parts)


def _on_devices(array: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yields the parts of an array on its devices, each once, with the index of the first number.

    Raises:
        UserError: if other processes have parts of the array.
    """
    if not isinstance(array, jax.Array):
        yield (0,) * np.ndim(array), np.asarray(array)
        return
    if not array.is_fully_addressable:
        raise UserError(
            "other processes have parts of an array; restore the checkpoint in a single process, "
            "and save it there"
        )
    seen = set()
    for shard in array.addressable_shards:
        first = tuple(part.start or 0 for part in shard.index)
        if first not in seen:
            seen.add(first)
            yield first, shard.data


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file. An existing file is unchanged if this fails.

    The library for these files needs all arrays in memory at once. This writes them part by part.

    Args:
        path: path of the file.
        tensors: arrays, or `Parts`, by name.
        metadata: texts by name.

    Raises:
        UserError: if the file cannot be written.
    """
    all_parts = {
        name: tensor if isinstance(tensor, Parts) else Parts.of(tensor)
        for name, tensor in tensors.items()
    }
    # Wide numbers come first, so that all are aligned.
    order = sorted(all_parts, key=lambda name: (-all_parts[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, end = {}, 0
    for name in order:
        shape, dtype, _ = all_parts[name]
        begins[name], end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": TYPES[dtype.name],
            "shape": list(shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(to: Path) -> None:
        with to.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                begin = 8 + len(text) + begins[name]
                for first, part in all_parts[name].parts():
                    _write_part(file, begin, all_parts[name], first, part)

    try:
        replace_whole(path, write)
    except OSError as error:
        raise UserError(f"cannot write {os.fspath(path)} as safetensors: {error}") from None


def _write_part(
    file: IO[bytes], begin: int, whole: Parts, first: tuple[int, ...], part: np.ndarray
) -> None:
    """Writes a part of an array to its places in a file, in pieces that are contiguous there."""
    axes = range(len(whole.shape))
    inner = next((axis for axis in reversed(axes) if part.shape[axis] != whole.shape[axis]), 0)
    strides = [math.prod(whole.shape[axis + 1 :]) for axis in axes]
    for outer in np.ndindex(*part.shape[:inner]):
        place = [*outer, *[0] * (len(axes) - inner)]
        number = sum(
            (start + more) * stride
            for start, more, stride in zip(first, place, strides, strict=True)
        )
        file.seek(begin + number * whole.dtype.itemsize)
        file.write(part[outer].astype(whole.dtype.newbyteorder("<"), copy=False).tobytes())
