"""Memory layout of the experts of a pool. Only this module defines it.

`down` and `up` of one expert are adjacent, so an expert is one contiguous read. The pools of equal
layers are stacked in one array. A layer is chosen by index when experts are read, never by slicing,
because a slice inside `lax.scan` copies the whole pool.

- "float32", "bfloat16": weights [*layers, N, 2, D].
- codes (`pallas_kernels.codes`): int32 words [*layers, units, 128] and float32 scales
  [*layers, 2, N]. A weight is its code times the scale of its vector.

A unit is 128 words (512 bytes). A DMA of a TPU moves one unit, or several consecutive ones, at no
extra cost. An expert is 2 W words (`pallas_kernels.packing`), `down` before `up`. Experts follow
each other without a gap. A line (a `row` in code) is the smallest group of experts that fills whole
units. It is two experts in one unit at D = 256 in int4, one in two units at D = 1024, and eight in
nine units at D = 576. Only the last line may have unused places.
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

# Layout of pools in words, for files that other programs read. A new layout needs a new version.
LAYOUT_VERSION = "1"
LAYOUT = (
    "int32 words; code c of a vector of D codes of b bits, two's complement, is in word c mod W, "
    "W = D b / 32, from bit b (c div W) upwards. Pool: [layers, units, 128], experts one after the "
    "other, `down` then `up`, W words each; weight = code * scale, scales [layers, 2, N]."
)
DOWN, UP = 0, 1
UNIT = 128  # words
FLOAT_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
STORAGES = (*FLOAT_DTYPES, *CODES)  # storages of pools
# Bits of arrays that are laid out like a pool: its codes, or accumulators of some width.
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
        scales: float32 [*layers, 2, N]: scale of each `down` and `up`; `None` for floats.
        layer: index of the layer of a stack to read, an integer; `None` for a pool that is not a
            stack.
        storage: "float32", "bfloat16", or a format of `pallas_kernels.codes`, such as "int4".
        num_experts: N, which is also the sentinel id for "no expert".
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
        """Returns a pool, or a stack of pools, with given float32 or bfloat16 weights."""
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
        """Number of weights of all experts of all layers, without scales."""
        layers = self.weights.shape[0] if self.is_stack else 1
        return layers * self.num_experts * 2 * self.width

    def at_layer(self, layer: Int[Array, ""] | None) -> ExpertPool:
        """Returns a pool of the same arrays that is read at `layer`. Copies nothing."""
        return dataclasses.replace(self, layer=layer)


class Experts(NamedTuple):
    """Chosen experts in float32. Their weights are `down * down_scale` and `up * up_scale`.

    Columns are in reading order, in as many arrays as a byte holds codes. On a CPU, putting the
    arrays side by side would cost more than the products that follow.
    """

    down: tuple[Float[Array, "*K columns"], ...]
    up: tuple[Float[Array, "*K columns"], ...]
    down_scale: Float[Array, "*K"]
    up_scale: Float[Array, "*K"]


def is_pool(node: Any) -> bool:
    """Returns whether a node of a tree is a pool, for `is_leaf` of `jax.tree.map`."""
    return isinstance(node, ExpertPool)


def accumulators_of(bits: int) -> str:
    """Returns the storage name of accumulators of `bits` bits."""
    return f"{bits}-bit accumulators"


def words_per_expert(width: int, storage: str) -> int:
    """Returns the number of words of `down` and `up` of one expert together.

    Raises:
        ValueError: if the codes of a vector do not fill whole words.
    """
    return 2 * words_per_vector(width, BITS[storage])


def experts_per_row(width: int, storage: str) -> int:
    """Returns the number of experts per line, the fewest that fill whole units together."""
    return UNIT // math.gcd(words_per_expert(width, storage), UNIT)


def units_per_row(width: int, storage: str) -> int:
    """Returns the number of units per line."""
    return experts_per_row(width, storage) * words_per_expert(width, storage) // UNIT


def packed_shape(num_experts: int, width: int, storage: str) -> tuple[int, int]:
    """Returns the shape of the words of one pool, (units, 128)."""
    rows = -(-num_experts // experts_per_row(width, storage))
    return rows * units_per_row(width, storage), UNIT


def splits_into(num_experts: int, parts: int) -> bool:
    """Returns whether equal parts of a pool have whole units, with codes of any width."""
    return num_experts % (parts * UNIT) == 0


def array_forms(storage: str, num_experts: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of a pool's arrays by attribute, without axes of layers.

    In a stack, the arrays have leading axes of layers.

    Raises:
        ValueError: if no pool has this storage, or the codes of a vector do not fill whole words.
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
    """Unpacks experts of an array that is laid out like the words of a pool. Ids must be valid."""
    return read_planes(words, layer, ids, width, storage).reshape(*ids.shape, 2, width)


def read_planes(
    words: Int[Array, "*layers units 128"],
    layer: Int[Array, ""] | None,
    ids: Int[Array, "*K"],
    width: int,
    storage: str,
) -> Int[Array, "*K 2 planes W"]:
    """Unpacks experts like `read_codes`, but with columns by plane, as words hold them.

    Code that XLA generates for a CPU is several times faster on planes. Flattening planes inside a
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
    """Overwrites experts. Ids must not repeat, and negative or too large ids are dropped."""
    planes = codes.reshape(*codes.shape[:-1], codes_per_word(BITS[storage]), -1)
    return write_planes(words, layer, ids, planes, storage)


def write_planes(
    words: Int[Array, "*layers units 128"],
    layer: Int[Array, ""] | None,
    ids: Int[Array, " M"],
    codes: Int[Array, "M 2 planes W"],
    storage: str,
) -> Int[Array, "*layers units 128"]:
    """Overwrites experts like `write_codes`, but takes columns by plane."""
    rows = pack_planes(codes, BITS[storage]).reshape(ids.shape[0], -1)
    return _write_words(words, layer, ids, rows)


def pack_experts(codes: Int[Array, "M 2 D"], storage: str) -> Int[Array, "units 128"]:
    """Lays out the codes of M experts as lines of words.

    Args:
        codes: codes of the experts. M is a multiple of the number of experts per line.
        storage: format of the codes.
    """
    shape = packed_shape(codes.shape[0], codes.shape[-1], storage)
    words = jnp.zeros(shape, jnp.int32)
    return write_codes(words, None, jnp.arange(codes.shape[0]), codes, storage)


def _read_words(words: Array, layer: Array | None, ids: Array, size: int) -> Array:
    """Gathers the `size` words of each expert: [*layers units 128] and [*K] give [*K size].

    On a TPU, viewing the words by expert would copy the pool, so units are gathered there.
    """
    return by_platform(
        words,
        ids,
        *(() if layer is None else (layer,)),
        tpu=partial(read_by_unit, size=size),
        default=partial(_read_by_expert, size=size),
    )


def _write_words(words: Array, layer: Array | None, ids: Array, rows: Array) -> Array:
    """Overwrites the words of experts in place. Ids outside the pool are dropped."""
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
    """Gathers the units that hold each expert, and extracts its words from them."""
    first, offset, window = _window(ids, size)
    units = words.at[(*layer, first[..., None] + jnp.arange(window))].get(mode="clip")
    lanes = offset[..., None] + jnp.arange(size)
    return jnp.take_along_axis(units.reshape(*ids.shape, -1), lanes, axis=-1)


def write_by_unit(words: Array, ids: Array, rows: Array, *layer: Array) -> Array:
    """Overwrites experts by adding the difference of the words to their units, which is exact.

    Experts that share a unit therefore do not overwrite each other.
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
    """Returns the places of experts of `size` words.

    Returns:
        The first unit of each expert, its first word in that unit, and the number of units to read.
        The number of units is enough for any expert.
    """
    together = UNIT // math.gcd(size, UNIT)
    in_row = (ids % together) * size
    first = ids // together * (together * size // UNIT) + in_row // UNIT
    largest_offset = max(place * size % UNIT for place in range(together))
    return first, in_row % UNIT, -(-(largest_offset + size) // UNIT)


def read_experts(pool: ExpertPool, ids: Int[Array, "*K"]) -> Experts:
    """Reads experts, with their columns in reading order. Ids outside [0, N) have scales of 0.

    Args:
        pool: a pool of one layer, or a stack with a chosen `layer`.
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
    """Returns float32 weights of experts, `down` before `up`; zeros for ids outside [0, N)."""
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
    """Returns the scales of `down` and `up`: 1 for floats, and 0 for ids outside [0, N)."""
    valid = (ids >= 0) & (ids < pool.num_experts)
    ones = valid.astype(jnp.float32)
    if not pool.is_packed:
        return ones, ones
    at = () if pool.layer is None else (pool.layer,)
    safe_ids = jnp.where(valid, ids, 0)
    return pool.scales[(*at, DOWN, safe_ids)] * ones, pool.scales[(*at, UP, safe_ids)] * ones


def to_reading_order(vectors: Float[Array, "*S D"], storage: str) -> Float[Array, "*S D"]:
    """Puts columns in the order that `read_experts` reads fastest."""
    return to_byte_order(vectors, BITS[storage]) if storage in BITS else vectors


def from_reading_order(vectors: Float[Array, "*S D"], storage: str) -> Float[Array, "*S D"]:
    """Reverses `to_reading_order`."""
    return from_byte_order(vectors, BITS[storage]) if storage in BITS else vectors


def add_to_experts(
    weights: Float[Array, "*layers N 2 D"],
    layer: Int[Array, ""] | None,
    ids: Int[Array, " M"],
    down: Float[Array, "M D"],
    up: Float[Array, "M D"],
) -> Float[Array, "*layers N 2 D"]:
    """Adds vectors to an array that is laid out like the weights of a float pool.

    Ids may repeat. Ids outside [0, N) are dropped.
    """
    safe_ids = jnp.where(ids < 0, weights.shape[-3], ids)
    index = safe_ids if layer is None else (layer, safe_ids)
    rows = jnp.stack([down, up], axis=1).astype(weights.dtype)
    return weights.at[index].add(rows, mode="drop")
