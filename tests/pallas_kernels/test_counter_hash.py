import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.counter_hash import hash_words, round_stochastically, uniform

COUNT = 1 << 18


def correlation(first, second):
    return abs(np.corrcoef(np.asarray(first, np.float64), np.asarray(second, np.float64))[0, 1])


@pytest.mark.parametrize("argument", ["seed", "step", "layer", "matrix", "expert"])
@pytest.mark.parametrize("distance", [1, 2, 2**16])
def test_neighbours_in_every_counter_are_uncorrelated(argument, distance):
    counters = {"seed": 3, "step": 100, "layer": 1, "matrix": 0, "expert": 12345}
    columns = jnp.arange(COUNT)
    first = hash_words(*counters.values(), columns)
    counters[argument] += distance
    second = hash_words(*counters.values(), columns)
    bound = 5 / COUNT**0.5  # five standard deviations
    assert correlation(uniform(first), uniform(second)) < bound
    for bit in (0, 7, 8, 15, 31):
        assert correlation((first >> bit) & 1, (second >> bit) & 1) < bound


def test_neighbouring_columns_are_uncorrelated_and_shifted_counters_do_not_collide():
    words = np.asarray(hash_words(1, 2, jnp.arange(COUNT)))
    for distance in (1, 2, 8, 64):
        assert correlation(words[:-distance], words[distance:]) < 5 / COUNT**0.5
    # (expert, column) and (expert + 1, column - 1) share their sum, and must share nothing else.
    ids, columns = jnp.meshgrid(jnp.arange(512), jnp.arange(512), indexing="ij")
    grid = np.asarray(hash_words(0, ids, columns))
    assert correlation(grid[:-1, 1:].ravel(), grid[1:, :-1].ravel()) < 5 / 511
    assert len(np.unique(grid)) > 0.9999 * grid.size  # 2^18 of 2^32: 8 birthdays expected


def test_words_are_uniform():
    words = np.asarray(hash_words(9, jnp.arange(COUNT)))
    counts = np.bincount(words >> 24, minlength=256)
    chi_square = np.sum((counts - COUNT / 256) ** 2) / (COUNT / 256)
    assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)
    numbers = np.asarray(uniform(jnp.array(words)))
    assert numbers.min() >= 0
    assert numbers.max() < 1


def test_the_same_bits_with_and_without_jit_and_shape():
    columns = jnp.arange(100)
    one = hash_words(5, jnp.int32(7), columns)
    np.testing.assert_array_equal(one, jax.jit(lambda step: hash_words(5, step, columns))(7))
    np.testing.assert_array_equal(one[40:60], hash_words(5, 7, jnp.arange(40, 60)))


def test_equals_the_same_hash_in_python_integers():
    def mix(state):
        state = (state ^ (state >> 16)) * 0x7FEB352D % 2**32
        state = (state ^ (state >> 15)) * 0x846CA68B % 2**32
        return state ^ (state >> 16)

    def python_hash(*counters):
        state = 0x9E3779B9
        for counter in counters:
            state = mix((state + 0x9E3779B9) % 2**32 ^ counter % 2**32)
        return state

    for counters in [(0,), (1, 2, 3), (2**31 - 1, -1, 0, 77), (12, 1, 400, 3, 1, 10**6, 255)]:
        assert int(hash_words(*counters)) == python_hash(*counters)


@pytest.mark.parametrize("value", [0.0, 0.25, -0.25, 1.5, -7.9, 1e-4, -1e-4, 1000.3])
def test_rounding_is_unbiased_and_to_a_neighbour(value):
    words = hash_words(11, jnp.arange(COUNT))
    rounded = np.asarray(round_stochastically(jnp.full(COUNT, value, jnp.float32), words))
    assert set(np.unique(rounded)) <= {np.floor(np.float32(value)), np.floor(np.float32(value)) + 1}
    fraction = np.float32(value) - np.floor(np.float32(value))
    bound = 5 * np.sqrt(fraction * (1 - fraction) / COUNT) + 1e-7
    assert abs(rounded.mean(dtype=np.float64) - np.float32(value)) <= bound
