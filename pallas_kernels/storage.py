"""How the experts of a pool lie in memory. The only module that knows.

`down` and `up` of one expert are adjacent, so that an expert is one contiguous read. The pools
of equal layers are stacked in one array; a layer is chosen by index at the moment of reading,
never by slicing, because a slice inside `lax.scan` copies the whole pool.

- "float32", "bfloat16": weights [*layers, N, 2, D].
- codes (`pallas_kernels.codes`): int32 words [*layers, units, 128]. A unit of 128 words (512
  bytes), or several in a row, is what a DMA of a TPU moves for free. An expert is 2 W words
  (`pallas_kernels.packing`; `down`, then `up`), and experts follow each other without a gap. A row
  is the fewest experts that fill whole units: two in one unit at D = 256 in int4, one in two units
  at D = 1024, eight in nine units at D = 576. Only the last row may have places left over. A weight
  is its code times the float32 scale of its vector, scales [*layers, 2, N].
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.codes import ACCUMULATOR_BITS, CODES
from pallas_kernels.packing import (
    codes_per_word,
    from_byte_order,
    pack_planes,
    to_byte_order,
    unpack_bytes,
    unpack_planes,
    words_per_vector,
)
from pallas_kernels.platforms import by_platform

# The layout of pools in words, for files that are read elsewhere; another layout, another version.
LAYOUT_VERSION = "1"
LAYOUT = (
    "int32 words; code c of a vector of D codes of b bits, two's complement, is in word c mod W, "
    "W = D b / 32, from bit b (c div W) upwards. Pool: [layers, units, 128], experts one after the "
    "other, `down` then `up`, W words each; weight = code * scale, scales [layers, 2, N]."
)
DOWN, UP = 0, 1
UNIT = 128  # words
FLOAT_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
STORAGES = (*FLOAT_DTYPES, *CODES)  # of pools
# Bits of what is laid out like a pool: its codes, or accumulators of some width.
BITS = {
    **{name: code.bits for name, code in CODES.items()},
    **{f"{bits}-bit accumulators": bits for bits in ACCUMULATOR_BITS if bits},
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertPool:
    """All experts of a layer, or of a stack of equal layers.

    Attributes:
        weights: floats [*layers, N, 2, D] or int32 words [*layers, units, 128].
        scales: float32 [*layers, 2, N] of `down` and `up`; `None` for floats.
        layer: which layer of a stack to read, an integer; `None` for a pool that is no stack.
        storage: "float32", "bfloat16", or a format of `pallas_kernels.codes`, such as "int4".
        num_experts: N, also the sentinel id that stands for "no expert".
        width: D, the width of the model.
    """

    weights: Any
    scales: Any = None
    layer: Any = None
    storage: str = dataclasses.field(default="float32", metadata={"static": True})
    num_experts: int = dataclasses.field(default=0, metadata={"static": True})
    width: int = dataclasses.field(default=0, metadata={"static": True})

    @staticmethod
    def of_floats(weights: Float[Array, "*layers N 2 D"]) -> ExpertPool:
        """A pool, or a stack of pools, of given float32 or bfloat16 weights."""
        storage = jnp.dtype(weights.dtype).name
        return ExpertPool(weights, None, None, storage, weights.shape[-3], weights.shape[-1])

    @property
    def is_packed(self) -> bool:
        """Whether the weights are integer codes."""
        return self.storage in CODES

    @property
    def is_stack(self) -> bool:
        """Whether the arrays have a leading axis of layers."""
        return self.weights.ndim > (2 if self.is_packed else 3)

    @property
    def num_parameters(self) -> int:
        """Weights of all experts of all layers, scales not counted."""
        layers = self.weights.shape[0] if self.is_stack else 1
        return layers * self.num_experts * 2 * self.width

    def at_layer(self, layer: Int[Array, ""]) -> ExpertPool:
        """The same storage, read at `layer`. Copies nothing."""
        return dataclasses.replace(self, layer=layer)


class Experts(NamedTuple):
    """Chosen experts, in float32: the weights are `down * down_scale` and `up * up_scale`.

    Columns are in reading order, and in as many arrays as a byte holds codes: to put them side by
    side would cost a CPU more than the products that follow.
    """

    down: tuple[Float[Array, "*K columns"], ...]
    up: tuple[Float[Array, "*K columns"], ...]
    down_scale: Float[Array, "*K"]
    up_scale: Float[Array, "*K"]


def accumulators_of(bits: int) -> str:
    """The name of the storage of accumulators of some bits."""
    return f"{bits}-bit accumulators"


def words_per_expert(width: int, storage: str) -> int:
    """Words of `down` and `up` of one expert.

    Raises:
        ValueError: if the width does not pack.
    """
    return 2 * words_per_vector(width, BITS[storage])


def experts_per_row(width: int, storage: str) -> int:
    """The fewest experts that fill whole units together."""
    return UNIT // math.gcd(words_per_expert(width, storage), UNIT)


def units_per_row(width: int, storage: str) -> int:
    """How many units a row fills."""
    return experts_per_row(width, storage) * words_per_expert(width, storage) // UNIT


def packed_shape(num_experts: int, width: int, storage: str) -> tuple[int, int]:
    """(units, 128): the shape of the words of one pool."""
    rows = -(-num_experts // experts_per_row(width, storage))
    return rows * units_per_row(width, storage), UNIT


def array_forms(storage: str, num_experts: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a pool by attribute; in a stack, they have leading axes of layers.

    Raises:
        ValueError: if no pool is stored like that.
    """
    if storage not in STORAGES:
        raise ValueError(f"pools are stored as {', '.join(STORAGES)}, not as {storage}")
    if storage in FLOAT_DTYPES:
        shape = (num_experts, 2, width)
        return {"weights": jax.ShapeDtypeStruct(shape, FLOAT_DTYPES[storage])}
    words = packed_shape(num_experts, width, storage)
    return {
        "weights": jax.ShapeDtypeStruct(words, jnp.int32),
        "scales": jax.ShapeDtypeStruct((2, num_experts), jnp.float32),
    }


def read_codes(
    words: Int[Array, "*layers units 128"],
    layer: Int[Array, ""] | None,
    ids: Int[Array, "*K"],
    width: int,
    storage: str,
) -> Int[Array, "*K 2 D"]:
    """Unpacks experts of an array laid out like the words of a pool; ids must be valid."""
    return read_planes(words, layer, ids, width, storage).reshape(*ids.shape, 2, width)


def read_planes(
    words: Int[Array, "*layers units 128"],
    layer: Int[Array, ""] | None,
    ids: Int[Array, "*K"],
    width: int,
    storage: str,
) -> Int[Array, "*K 2 planes W"]:
    """`read_codes` with columns by plane, as words hold them.

    Code that XLA writes for a CPU is several times faster on planes: to flatten them inside of a
    loop costs a division for every code.
    """
    rows = _read_words(words, layer, ids, words_per_expert(width, storage))
    return unpack_planes(rows.reshape(*ids.shape, 2, -1), BITS[storage])


def write_codes(
    words: Int[Array, "*layers units 128"],
    layer: Int[Array, ""] | None,
    ids: Int[Array, " M"],
    codes: Int[Array, "M 2 D"],
    storage: str,
) -> Int[Array, "*layers units 128"]:
    """Overwrites experts; ids must not repeat, and negative or too large ones are dropped."""
    planes = codes.reshape(*codes.shape[:-1], codes_per_word(BITS[storage]), -1)
    return write_planes(words, layer, ids, planes, storage)


def write_planes(
    words: Int[Array, "*layers units 128"],
    layer: Int[Array, ""] | None,
    ids: Int[Array, " M"],
    codes: Int[Array, "M 2 planes W"],
    storage: str,
) -> Int[Array, "*layers units 128"]:
    """`write_codes` with columns by plane."""
    rows = pack_planes(codes, BITS[storage]).reshape(ids.shape[0], -1)
    return _write_words(words, layer, ids, rows)


def pack_experts(codes: Int[Array, "M 2 D"], storage: str) -> Int[Array, "units 128"]:
    """Lays out the codes of M experts, a multiple of those in a row, as rows of words."""
    shape = packed_shape(codes.shape[0], codes.shape[-1], storage)
    words = jnp.zeros(shape, jnp.int32)
    return write_codes(words, None, jnp.arange(codes.shape[0]), codes, storage)


def _read_words(words: Array, layer: Array | None, ids: Array, size: int) -> Array:
    """Gathers the `size` words of each expert: [*layers units 128] and [*K] give [*K size].

    On a TPU, to view the words by expert would copy the pool: there, units are gathered.
    """
    return by_platform(
        words,
        ids,
        *(() if layer is None else (layer,)),
        tpu=partial(read_by_unit, size=size),
        default=partial(_read_by_expert, size=size),
    )


def _write_words(words: Array, layer: Array | None, ids: Array, rows: Array) -> Array:
    """Overwrites the words of experts, in place; drops ids that are outside."""
    return by_platform(
        words,
        ids,
        rows,
        *(() if layer is None else (layer,)),
        tpu=write_by_unit,
        default=_write_by_expert,
    )


def _read_by_expert(words: Array, ids: Array, *layer: Array, size: int) -> Array:
    return words.reshape(*words.shape[:-2], -1, size)[(*layer, ids)]


def _write_by_expert(words: Array, ids: Array, rows: Array, *layer: Array) -> Array:
    experts = words.reshape(*words.shape[:-2], -1, rows.shape[-1])
    places = jnp.where(ids < 0, experts.shape[-2], ids)
    written = experts.at[(*layer, places)].set(rows, mode="drop", unique_indices=True)
    return written.reshape(words.shape)


def read_by_unit(words: Array, ids: Array, *layer: Array, size: int) -> Array:
    """Gathers the units that hold each expert, and takes its words out of them."""
    first, offset, window = _window(ids, size)
    units = words.at[(*layer, first[..., None] + jnp.arange(window))].get(mode="clip")
    lanes = offset[..., None] + jnp.arange(size)
    return jnp.take_along_axis(units.reshape(*ids.shape, -1), lanes, axis=-1)


def write_by_unit(words: Array, ids: Array, rows: Array, *layer: Array) -> Array:
    """Overwrites experts by adding to their units the difference of the words, which is exact.

    So experts that share a unit do not overwrite each other.
    """
    count, size = rows.shape
    valid = (ids >= 0) & (ids < words.shape[-2] * UNIT // size)
    old = read_by_unit(words, jnp.where(valid, ids, 0), *layer, size=size)
    first, offset, window = _window(ids, size)
    lanes = offset[:, None] + jnp.arange(size)
    change = jnp.zeros((count, window * UNIT), jnp.int32)
    change = change.at[jnp.arange(count)[:, None], lanes].set(rows - old)
    units = jnp.where(valid[:, None], first[:, None] + jnp.arange(window), words.shape[-2])
    return words.at[(*layer, units)].add(change.reshape(count, window, UNIT), mode="drop")


def _window(ids: Array, size: int) -> tuple[Array, Array, int]:
    """Where experts of `size` words lie: their first unit, their first word in it, units to read.

    The number of units is enough for any of the experts.
    """
    together = UNIT // math.gcd(size, UNIT)
    in_row = (ids % together) * size
    first = ids // together * (together * size // UNIT) + in_row // UNIT
    largest_offset = max(place * size % UNIT for place in range(together))
    return first, in_row % UNIT, -(-(largest_offset + size) // UNIT)


def read_experts(pool: ExpertPool, ids: Int[Array, "*K"]) -> Experts:
    """Reads experts, their columns in reading order; ids outside [0, N) read zeros.

    Args:
        pool: a pool of one layer, or a stack with its `layer` chosen.
        ids: expert numbers.
    """
    # Out-of-range ids must not wrap (negative) and must not clamp (too large).
    safe_ids = jnp.where((ids >= 0) & (ids < pool.num_experts), ids, 0)
    if pool.is_packed:
        size = words_per_expert(pool.width, pool.storage)
        words = _read_words(pool.weights, pool.layer, safe_ids, size)
        parts = unpack_bytes(words.reshape(*ids.shape, 2, -1), BITS[pool.storage])
    else:
        rows = pool.weights[safe_ids] if pool.layer is None else pool.weights[pool.layer, safe_ids]
        parts = (rows,)
    down, up = (
        tuple(part[..., vector, :].astype(jnp.float32) for part in parts) for vector in (DOWN, UP)
    )
    return Experts(down, up, *read_scales(pool, ids))


def read_floats(pool: ExpertPool, ids: Int[Array, "*K"]) -> Float[Array, "*K 2 D"]:
    """The weights of experts, `down` before `up`, in float32; zeros for ids outside [0, N)."""
    experts = read_experts(pool, ids)
    vectors = [
        scale[..., None] * from_reading_order(jnp.concatenate(parts, axis=-1), pool.storage)
        for parts, scale in (
            (experts.down, experts.down_scale),
            (experts.up, experts.up_scale),
        )
    ]
    return jnp.stack(vectors, axis=-2)


def read_scales(
    pool: ExpertPool, ids: Int[Array, "*K"]
) -> tuple[Float[Array, "*K"], Float[Array, "*K"]]:
    """The scales of `down` and `up`, 1 for floats; 0 for ids outside [0, N)."""
    valid = (ids >= 0) & (ids < pool.num_experts)
    ones = valid.astype(jnp.float32)
    if not pool.is_packed:
        return ones, ones
    at = () if pool.layer is None else (pool.layer,)
    safe_ids = jnp.where(valid, ids, 0)
    return pool.scales[(*at, DOWN, safe_ids)] * ones, pool.scales[(*at, UP, safe_ids)] * ones


def to_reading_order(vectors: Float[Array, "*S D"], storage: str) -> Float[Array, "*S D"]:
    """Puts columns in the order in which `read_experts` reads them fastest."""
    return to_byte_order(vectors, BITS[storage]) if storage in BITS else vectors


def from_reading_order(vectors: Float[Array, "*S D"], storage: str) -> Float[Array, "*S D"]:
    """Puts columns back where `to_reading_order` took them from."""
    return from_byte_order(vectors, BITS[storage]) if storage in BITS else vectors


def add_to_experts(
    weights: Float[Array, "*layers N 2 D"],
    layer: Int[Array, ""] | None,
    ids: Int[Array, " M"],
    down: Float[Array, "M D"],
    up: Float[Array, "M D"],
) -> Float[Array, "*layers N 2 D"]:
    """Adds rows to an array laid out like the weights of a float pool; ids may repeat.

    Ids outside [0, N) are dropped.
    """
    safe_ids = jnp.where(ids < 0, weights.shape[-3], ids)
    index = safe_ids if layer is None else (layer, safe_ids)
    rows = jnp.stack([down, up], axis=1).astype(weights.dtype)
    return weights.at[index].add(rows, mode="drop")
