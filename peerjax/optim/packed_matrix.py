"""Matrices of any model as packed codes, which `int4_accumulation` trains as it trains pools.

A matrix is [*rows, D]. Each row, a vector along the last axis, has a scale. A weight is a code
times the scale of its row. Codes are stored in the words of `pallas_kernels.packing`. A width that
does not fill whole words is padded with zeros.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from pallas_kernels.codes import CODES, Code
from pallas_kernels.counter_hash import Purpose, hash_words
from pallas_kernels.expert_update import Hyperparameters, Statistics, UpdateState
from pallas_kernels.expert_update.integer_step import nearest
from pallas_kernels.expert_update.packed_rows import RowNumbers, step_rows
from pallas_kernels.packing import codes_per_word, pack_planes, unpack_planes

# Complements `pallas_kernels.storage.LAYOUT`, which describes the order of codes in words.
LAYOUT = "Matrix: [rows, W], its width padded to whole words; scales [rows]."
# Compiled once per shape. Otherwise its loop would be compiled at every call.
_nearest = jax.jit(nearest, static_argnames="code")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix in packed codes. Make one with `pack`, read it with `dequantize`.

    Attributes:
        words: int32 [*rows, W].
        scales: float32 [*rows].
        width: D, columns of the matrix.
        storage: name of the format of the codes in `pallas_kernels.codes`, such as "int4".
    """

    words: Any
    scales: Any
    width: int = dataclasses.field(metadata={"static": True})
    storage: str = dataclasses.field(metadata={"static": True})

    @property
    def code(self) -> Code:
        """The format of the codes."""
        return CODES[self.storage]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return (*self.scales.shape, self.width)

    def codes(self) -> Int[Array, "*rows D"]:
        """Returns the codes as int32."""
        planes = unpack_planes(self.words, self.code.bits)
        return planes.reshape(*self.scales.shape, -1)[..., : self.width]

    def floats(self) -> Float[Array, "*rows D"]:
        """Returns the weights as float32."""
        return self.codes() * self.scales[..., None]


def array_forms(width: int, storage: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of one packed row, by attribute of `PackedMatrix`.

    The arrays of a matrix have leading axes of rows in addition.

    Raises:
        ValueError: if matrices cannot be packed in that format.
    """
    _check_storage(storage)
    words = -(-width // codes_per_word(CODES[storage].bits))
    return {
        "words": jax.ShapeDtypeStruct((words,), jnp.int32),
        "scales": jax.ShapeDtypeStruct((), jnp.float32),
    }


def is_packed_matrix(node: Any) -> bool:
    """Returns whether a node of a tree is a `PackedMatrix`, for `is_leaf` of `jax.tree.map`."""
    return isinstance(node, PackedMatrix)


def pack(weights: Float[Array, "*rows D"], storage: str = "int4") -> PackedMatrix:
    """Packs a matrix, rounded to nearest. Each row gets the scale that training would give it.

    Weights beyond the range of codes are clipped. In int4, these are weights beyond 2.7 times the
    RMS of a row, unless they have most of the row's sum of squares.

    Args:
        weights: floats. The weights of each row, along the last axis, share a scale and a second
            moment.
        storage: the format of the codes: "int8", "int4", "int3" or "ternary".

    Raises:
        ValueError: if `weights` has no rows or is empty, or the format is another one. Outside of
            `jax.jit`, also if the scale of a row is not finite.
    """
    _check_storage(storage)
    code = CODES[storage]
    if weights.ndim < 2:
        raise ValueError(f"an array of shape {weights.shape} has no rows to pack; keep it unpacked")
    if not weights.size:
        raise ValueError(f"an array of shape {weights.shape} is empty; keep it unpacked")
    codes, scales = _nearest(weights, code=code)
    if not isinstance(scales, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(scales))):
        raise ValueError("weights, or their squares, are not finite and cannot be packed")
    words = pack_planes(_by_plane(codes, code.bits), code.bits)
    return PackedMatrix(words, scales, weights.shape[-1], storage)


def dequantize(params: Any) -> Any:
    """Returns the tree to differentiate: every `PackedMatrix` is replaced by float32 weights."""
    return jax.tree.map(
        lambda leaf: leaf.floats() if is_packed_matrix(leaf) else leaf,
        params,
        is_leaf=is_packed_matrix,
    )


def zero_state(matrix: PackedMatrix, accumulator_bits: int) -> UpdateState:
    """Returns the update state of a matrix before the first step.

    Moments are [*rows], not [2, N] as for pools. The arrays are computed from the scales, so that
    they are on the same devices.
    """
    moments = jnp.zeros_like(matrix.scales)
    accumulators = None
    if accumulator_bits:
        padded = matrix.words.shape[-1] * codes_per_word(matrix.code.bits)
        words = -(-padded // codes_per_word(accumulator_bits))
        accumulators = moments.astype(jnp.int32)[..., None] * jnp.zeros(words, jnp.int32)
    return UpdateState(accumulators, moments)


def update_matrix(
    matrix: PackedMatrix,
    state: UpdateState,
    gradient: Float[Array, "*rows D"],
    hyperparameters: Hyperparameters,
    *,
    seed: UInt[Array, ""],
    step: Int[Array, ""],
    accumulator_bits: int,
) -> tuple[PackedMatrix, UpdateState, Statistics]:
    """Takes one step of the row-wise rule. Rows without a finite gradient do not change.

    Returns:
        The *change* of the matrix, the new state, and counts. The caller adds the words and scales
        of the change to the old ones.
    """
    bits = matrix.code.bits
    codes = unpack_planes(matrix.words, bits)
    accumulators = jnp.zeros_like(codes)
    if accumulator_bits:
        flat = unpack_planes(state.accumulators, accumulator_bits)
        flat = flat.reshape(*matrix.scales.shape, -1)[..., : codes.shape[-1] * codes.shape[-2]]
        accumulators = flat.reshape(codes.shape)
    rows = jnp.arange(matrix.scales.size).reshape(*matrix.scales.shape, 1, 1)
    column = jnp.arange(codes.shape[-1] * codes.shape[-2]).reshape(codes.shape[-2:])
    codes, accumulators, numbers, counts = step_rows(
        codes,
        accumulators,
        _by_plane(gradient.astype(jnp.float32), bits),
        RowNumbers(matrix.scales, state.moments),
        lambda: hash_words(seed, Purpose.MATRIX_STEP, step, rows, column),
        hyperparameters,
        width=matrix.width,
        code=matrix.code,
        bits=accumulator_bits,
    )
    new_accumulators = None
    if accumulator_bits:
        flat = accumulators.reshape(*matrix.scales.shape, -1)
        new_accumulators = pack_planes(_by_plane(flat, accumulator_bits), accumulator_bits)
    change = dataclasses.replace(
        matrix, words=pack_planes(codes, bits) - matrix.words, scales=numbers.scales - matrix.scales
    )
    new_state = UpdateState(new_accumulators, numbers.moments)
    sums = [jnp.sum(each, dtype=jnp.float32) for each in counts]
    return change, new_state, Statistics(jnp.zeros((), jnp.float32), *sums)


def _check_storage(storage: str) -> None:
    if storage not in CODES:
        raise ValueError(f"matrices can be packed as {', '.join(CODES)}, not as {storage!r}")


def _by_plane(rows: Array, bits: int) -> Array:
    """Reshapes [*rows, D] to [*rows, planes, W], padded to whole words."""
    count = codes_per_word(bits)
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % count)]
    return jnp.pad(rows, padding).reshape(*rows.shape[:-1], count, -1)
