import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.packing import (
    codes_per_word,
    from_byte_order,
    pack,
    to_byte_order,
    unpack,
    unpack_bytes,
)
from pallas_kernels.storage import (
    BITS,
    UNIT,
    packed_shape,
    read_by_unit,
    read_codes,
    words_per_expert,
    write_by_unit,
    write_codes,
)

bit_widths = st.sampled_from([2, 4, 8, 16])


@settings(deadline=None, max_examples=60)
@given(bit_widths, st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_codes_come_back(bits, words, seed):
    rng = np.random.default_rng(seed)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = rng.integers(low, high, (3, words * codes_per_word(bits)))
    np.testing.assert_array_equal(unpack(pack(jnp.array(codes), bits), bits), codes)


@settings(deadline=None, max_examples=60)
@given(bit_widths, st.integers(0, 2**32 - 1))
def test_words_come_back(bits, seed):
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (2, 4), dtype=np.int64)
    words = jnp.array(words, jnp.int32)
    np.testing.assert_array_equal(pack(unpack(words, bits), bits), words)


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_hold_the_same_codes_in_byte_order(bits):
    rng = np.random.default_rng(bits)
    limit = 1 << (bits - 1)
    codes = jnp.array(rng.integers(-limit, limit, (3, 5, 48)), jnp.int32)
    in_order = to_byte_order(codes, bits)
    side_by_side = jnp.concatenate(unpack_bytes(pack(codes, bits), bits), axis=-1)
    np.testing.assert_array_equal(side_by_side, in_order)
    np.testing.assert_array_equal(from_byte_order(in_order, bits), codes)
    assert np.any(in_order != codes)


def test_the_stated_order_of_nibbles():
    # 16 codes in two words: word j holds codes j, j + 2, ..., the first in the lowest bits.
    codes = jnp.arange(16) % 8
    first = sum(int(codes[2 * index]) << (4 * index) for index in range(8))
    assert int(pack(codes, 4)[0]) == first


def test_a_width_that_does_not_pack_is_named():
    with pytest.raises(ValueError, match="a width of 100 does not pack: int4 codes"):
        pack(jnp.zeros(100, jnp.int32), 4)


def packable(widths):
    """Every storage with each of the widths that fill its words."""
    return [
        (name, width) for name, bits in BITS.items() for width in widths if not width * bits % 32
    ]


@pytest.mark.parametrize(("storage", "width"), packable([8, 128, 192, 256, 512, 576, 1024, 1536]))
def test_experts_come_back_from_whole_units(storage, width):
    num_experts = 37
    shape = packed_shape(num_experts, width, storage)
    assert shape[-1] == UNIT
    rng = np.random.default_rng(width)
    words = jnp.array(rng.integers(-99, 99, (2, *shape)), jnp.int32)
    ids = jnp.array([0, 36, 5, 17])
    limit = 1 << (BITS[storage] - 1)
    codes = jnp.array(rng.integers(-limit, limit, (4, 2, width)), jnp.int32)
    layer = jnp.int32(1)
    written = write_codes(words, layer, ids, codes, storage)
    np.testing.assert_array_equal(read_codes(written, layer, ids, width, storage), codes)
    # Nothing else has changed.
    others = jnp.array([n for n in range(num_experts) if n not in ids.tolist()])
    for at, where in ((layer, others), (jnp.int32(0), jnp.arange(num_experts))):
        before = read_codes(words, at, where, width, storage)
        np.testing.assert_array_equal(read_codes(written, at, where, width, storage), before)


@pytest.mark.parametrize(("storage", "width"), packable([8, 24, 192, 256, 576, 1024, 1536]))
def test_whole_rows_hold_nothing_but_codes(storage, width):
    num_experts = 4096
    words = math.prod(packed_shape(num_experts, width, storage))
    assert words * 32 == num_experts * 2 * width * BITS[storage]


@pytest.mark.parametrize("width", [8, 192, 256, 576, 1024, 1536])
def test_units_are_read_and_written_as_experts_are(width):
    """What a TPU does, against what other platforms do."""
    num_experts, size = 37, words_per_expert(width, "int4")
    rng = np.random.default_rng(width)
    shape = (2, *packed_shape(num_experts, width, "int4"))
    words = jnp.array(rng.integers(-(2**31), 2**31, shape), jnp.int32)
    layer, ids = jnp.int32(1), jnp.array([0, 36, 5, 4, 6, -1, 2**30])
    rows = jnp.array(rng.integers(-(2**31), 2**31, (len(ids), size)), jnp.int32)
    written = write_by_unit(words, ids, rows, layer)
    experts = words.reshape(2, -1, size)
    expected = experts.at[1, ids[:5]].set(rows[:5]).reshape(shape)
    np.testing.assert_array_equal(written, expected)
    read = read_by_unit(words, ids[:5], layer, size=size)
    np.testing.assert_array_equal(read, experts[1, ids[:5]])


@pytest.mark.parametrize("outside", [-1, -5, 40, 2**31 - 1])
def test_writing_outside_the_pool_changes_nothing(outside):
    words = jnp.arange(2 * 10 * UNIT, dtype=jnp.int32).reshape(2, 10, UNIT)  # 40 experts of 128
    codes = jnp.ones((1, 2, 128), jnp.int32)
    written = write_codes(words, jnp.int32(0), jnp.array([outside]), codes, "int4")
    np.testing.assert_array_equal(written, words)


def test_the_last_row_of_a_stack_of_more_than_2_to_the_31_words_is_addressed():
    import jax

    # 40 layers of 2^19 units: 2.7e9 words. Compiled, not run.
    shape = jax.ShapeDtypeStruct((40, 1 << 19, UNIT), jnp.int32)

    def last(words):
        return read_codes(words, jnp.int32(39), jnp.array([(1 << 20) - 1]), 256, "int4")

    text = jax.jit(last).lower(shape).as_text()
    assert "tensor<40x1048576x64xi32>" in text  # two indices, no flattened one
    assert words_per_expert(256, "int4") == 64
