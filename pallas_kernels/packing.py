"""Small signed integers, packed several to an int32 word.

A vector of D codes of `bits` bits takes W = D * bits / 32 words. Code c lies in word c mod W, in
the bits from `bits * (c div W)` upwards, two's complement. So a shift of all words yields W
neighbouring columns at once, and no lane ever moves.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

WORD_BITS = 32


def codes_per_word(bits: int) -> int:
    """How many codes share a word."""
    return WORD_BITS // bits


def words_per_vector(width: int, bits: int) -> int:
    """W: how many words a vector of `width` codes takes.

    Raises:
        ValueError: if the width does not fill whole words.
    """
    if width % codes_per_word(bits):
        raise ValueError(
            f"a width of {width} does not pack: int{bits} codes need a multiple of "
            f"{codes_per_word(bits)}"
        )
    return width // codes_per_word(bits)


def pack(codes: Int[Array, "*S D"], bits: int) -> Int[Array, "*S W"]:
    """Packs codes, of which only the low `bits` bits are kept, into int32 words."""
    words_per_vector(codes.shape[-1], bits)
    mask = (1 << bits) - 1
    parts = jnp.split(codes.astype(jnp.int32) & mask, codes_per_word(bits), axis=-1)
    words = parts[0]
    for index, part in enumerate(parts[1:], start=1):
        words = words | (part << (bits * index))
    return words


def unpack(words: Int[Array, "*S W"], bits: int) -> Int[Array, "*S D"]:
    """Unpacks int32 words to int32 codes, sign included."""
    top = WORD_BITS - bits
    parts = [
        jax.lax.shift_right_arithmetic(words << (top - bits * index), jnp.int32(top))
        for index in range(codes_per_word(bits))
    ]
    return jnp.concatenate(parts, axis=-1)
