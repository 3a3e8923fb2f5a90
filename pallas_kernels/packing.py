"""Small signed integers, packed several to an int32 word.

A vector of D codes of `bits` bits takes W = D * bits / 32 words. Code c lies in word c mod W, in
the bits from `bits * (c div W)` upwards, in two's complement. A shift of all words therefore yields
W neighbouring columns at once, and moves no data between lanes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int8, Num

WORD_BITS = 32


def codes_per_word(bits: int) -> int:
    """Returns the number of codes per word."""
    return WORD_BITS // bits


def words_per_vector(width: int, bits: int) -> int:
    """Returns W, the number of words of a vector of `width` codes.

    Raises:
        ValueError: if the codes do not fill whole words.
    """
    if width % codes_per_word(bits):
        raise ValueError(
            f"a width of {width} does not pack: int{bits} codes need a multiple of "
            f"{codes_per_word(bits)}"
        )
    return width // codes_per_word(bits)


def pack(codes: Int[Array, "*S D"], bits: int) -> Int[Array, "*S W"]:
    """Packs the low `bits` bits of codes into int32 words."""
    words_per_vector(codes.shape[-1], bits)
    return pack_planes(codes.reshape(*codes.shape[:-1], codes_per_word(bits), -1), bits)


def pack_planes(codes: Int[Array, "*S planes W"], bits: int) -> Int[Array, "*S W"]:
    """Packs codes whose columns are given by plane: the first W columns, the next W, ..."""
    parts = codes.astype(jnp.int32) & ((1 << bits) - 1)
    # The parts have no bit in common, so their sum is their union.
    return jnp.sum(parts << _offsets(bits), axis=-2, dtype=jnp.int32)


def unpack(words: Int[Array, "*S W"], bits: int) -> Int[Array, "*S D"]:
    """Unpacks int32 words to signed int32 codes."""
    return unpack_planes(words, bits).reshape(*words.shape[:-1], -1)


def unpack_planes(words: Int[Array, "*S W"], bits: int) -> Int[Array, "*S planes W"]:
    """Unpacks int32 words to signed int32 codes, with their columns by plane."""
    top = WORD_BITS - bits
    return (words[..., None, :] << (top - _offsets(bits))) >> top


def unpack_bytes(words: Int[Array, "*S W"], bits: int) -> tuple[Int8[Array, "*S bytes"], ...]:
    """Unpacks int32 words to int8 codes in the order of the bytes, without moving any.

    This is faster on a CPU than `unpack`, because it shifts bytes and only floats are wide. There
    is one array for each code that a byte holds. Side by side, the arrays are in the order of
    `to_byte_order`.
    """
    octets = jax.lax.bitcast_convert_type(words, jnp.int8).reshape(*words.shape[:-1], -1)
    return tuple((octets << (8 - bits - low)) >> (8 - bits) for low in range(0, 8, bits))


def to_byte_order(vector: Num[Array, "*S D"], bits: int) -> Num[Array, "*S D"]:
    """Puts the columns of a vector in the order of `unpack_bytes`."""
    planes = 8 // bits
    by_code = vector.reshape(*vector.shape[:-1], WORD_BITS // 8, planes, -1)
    return jnp.moveaxis(by_code, -3, -1).reshape(vector.shape)


def from_byte_order(vector: Num[Array, "*S D"], bits: int) -> Num[Array, "*S D"]:
    """Reverses `to_byte_order`."""
    planes = 8 // bits
    by_byte = vector.reshape(*vector.shape[:-1], planes, -1, WORD_BITS // 8)
    return jnp.moveaxis(by_byte, -1, -3).reshape(vector.shape)


def _offsets(bits: int) -> Int[Array, "codes 1"]:
    """Returns the lowest bit of each code of a word."""
    return bits * jnp.arange(codes_per_word(bits), dtype=jnp.int32)[:, None]
